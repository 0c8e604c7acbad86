// The launch configuration of a kernel.
#pragma once

#include <cstdint>

namespace cen::cuda {

struct Launch {
  int64_t blocks;
  int threads_x, threads_y;
  int64_t shared_bytes;  // dynamic shared memory per block
  int cluster;           // blocks per cluster; 1 for none
  bool cooperative;      // all blocks are resident at once
  void* stream;
};

}  // namespace cen::cuda
