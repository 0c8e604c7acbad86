// The CUDA kernels as the ops see them.
#pragma once

#include <functional>

#include "../problem.h"

namespace cen::cuda {

// What plans are made from.
struct Device {
  int multiprocessors;
  int capability;        // 90 for 9.0
  int64_t shared_bytes;  // that a block may have, at the most
  int threads = 256;     // of a block of the two-pass plan, at the most
};

// How a call goes over memory. Statistics that are given need one pass whatever the plan.
enum class Kind {
  automatic,
  two_pass,  // two passes: sums of chunks, then results
  cluster,   // one pass: the blocks of a cluster keep a strip of channels on chip (one block where it is
             // small)
  grid,      // one pass: all blocks run at once and keep the whole layer on chip
};

// Memory of the device, in stream order, until the call returns.
using Allocate = std::function<void*(int64_t bytes)>;

// The current device, asked once. Throws std::runtime_error with CUDA's words.
const Device& current_device();

// Run on the current device. Throw std::invalid_argument where a plan that is asked for cannot run this
// problem, std::runtime_error with CUDA's words if a launch fails.
template <class T>
void forward(const Problem&, const ForwardTensors<T>&, Kind, const Device&, const Allocate&, void* stream);
template <class T>
void backward(const Problem&, const BackwardTensors<T>&, Kind, const Device&, const Allocate&, void* stream);

}  // namespace cen::cuda
