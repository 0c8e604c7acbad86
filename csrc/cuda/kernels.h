// The interface of the CUDA kernels to the ops.
#pragma once

#include <functional>

#include "../pixel_shift.h"
#include "../problem.h"

namespace cen::cuda {

// The device properties that plans depend on.
struct Device {
  int multiprocessors;
  int capability;        // 90 for 9.0
  int64_t shared_bytes;  // maximum dynamic shared memory per block
  int threads = 256;     // maximum threads per block of the two-pass plan
};

// The plan of a call. With given statistics every plan is a single pass. Layer norm has one plan, which runs
// whatever is asked for.
enum class Kind {
  automatic,
  two_pass,  // two passes over memory: partial sums, then results
  cluster,   // one pass: a cluster (or one block, if it suffices) keeps a strip of channels in shared memory
  grid,      // one pass: the blocks of a cooperative launch keep the whole layer in shared memory
};

// Allocates device memory, in stream order, that is valid until the call returns.
using Allocate = std::function<void*(int64_t bytes)>;

// The properties of the current device, queried once per device. Throws std::runtime_error with CUDA's
// message.
const Device& current_device();

// Run on the current device. Throw std::invalid_argument if the requested plan cannot run this problem, and
// std::runtime_error with CUDA's message if a launch fails.
template <class T>
void forward(const Problem&, const ForwardTensors<T>&, Kind, const Device&, const Allocate&, void* stream);
template <class T>
void backward(const Problem&, const BackwardTensors<T>&, Kind, const Device&, const Allocate&, void* stream);

// base may be null.
template <class T>
void pixel_shift(const PixelShift&, const T* x, const T* base, T* y, void* stream);

}  // namespace cen::cuda
