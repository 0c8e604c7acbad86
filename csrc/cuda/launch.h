// What a launch asks of the device.
#pragma once

#include <cstdint>

namespace cen::cuda {

struct Launch {
  int64_t blocks;
  int threads_x, threads_y;
  int64_t shared_bytes;  // dynamic shared memory of a block
  int cluster;           // blocks that share theirs; 1: none
  bool cooperative;      // all blocks are to run at once
  void* stream;
};

}  // namespace cen::cuda
