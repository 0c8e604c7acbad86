// The CPU kernels, compiled once per instruction set and chosen at run time.
#pragma once

#include <type_traits>
#include <vector>

#include "../pixel_shift.h"
#include "../problem.h"

namespace cen::cpu {

// The parallel loop: run() calls body(context, begin, end) for ranges that cover [0, tasks), on any threads.
// Results never depend on the number of threads, because reductions are split by sizes alone.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// One call of max pooling (max_pool_same.h).
struct Pooling {
  int64_t images;         // N for channels last, else N * C, contiguous
  int64_t rows, length;   // rows per image, values per row
  int64_t step;           // stride between the pixels of a row, in values: C for channels last, else 1
  int64_t size;           // window size: odd, at most 15
  bool streaming_stores;  // store results with non-temporal stores, because they are large

  constexpr int64_t radius() const { return size / 2; }
  constexpr int64_t halo() const { return radius() * step; }  // values per side that a window reaches
};

// A 3x3 convolution of stride 1 that preserves the image size (conv3x3/conv3x3.h). Images are [images, rows,
// columns, channels], weights [outputs, 3, 3, inputs]; inputs and outputs are multiples of 32.
struct Convolution {
  int64_t images, rows, columns;
  int64_t inputs, outputs;
  int64_t dilation;
};

template <class T>
struct KernelsOf {
  void (*forward)(const Problem&, const ForwardTensors<T>&, const Parallel&);
  void (*backward)(const Problem&, const BackwardTensors<T>&, const Parallel&);
  void (*max_pool)(const Pooling&, const T* x, T* y, uint8_t* winners, const Parallel&);
  void (*max_pool_backward)(const Pooling&, const T* dy, const uint8_t* winners, T* dx, const Parallel&);
  void (*pixel_shift)(const PixelShift&, const T* x, const T* base, T* y,
                      const Parallel&);  // base may be null
};

// The kernels of an instruction set are two translation units, because each takes a minute or more to
// compile.
struct Kernels : KernelsOf<float>, KernelsOf<double> {
  // bias may be null.
  void (*convolve)(const Convolution&, const float* x, const float* weight, const float* bias, float* y,
                   const Parallel&);
  void (*convolve_backward)(const Convolution&, const float* dy, const float* weight, float* dx,
                            const Parallel&);
  void (*convolve_weight_gradient)(const Convolution&, const float* dy, const float* x, float* dweight,
                                   const Parallel&);
};
struct HalfKernels : KernelsOf<Half>, KernelsOf<BFloat16> {};

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const HalfKernels* half_kernels;
  bool supported;  // by this processor

  template <class T>
  const KernelsOf<T>& of() const {
    if constexpr (std::is_base_of_v<KernelsOf<T>, HalfKernels>)
      return *half_kernels;
    else
      return *kernels;
  }
};

// The instruction sets of this build, best last.
const std::vector<InstructionSet>& instruction_sets();

// The best instruction set of this processor, or the one that the environment variable CEN_EXT_CPU_CAPABILITY
// names. Chosen at the first call. Throws std::runtime_error if the variable names none that runs here.
const InstructionSet& instruction_set();

// running = (1 - momentum) * running + momentum * batch, where batch is the statistics [units, C] averaged
// over groups to [M, C], with the unbiased variance.
template <class R>
void update_running(const Problem& p, const R* batch_mean, const R* batch_var, R* running_mean,
                    R* running_var);

// Uninitialized scratch memory, aligned to 64 bytes. Freed blocks are cached per thread up to a limit: the C
// library would return blocks of this size to the system, and page faults at every call cost a small layer a
// tenth of its time.
void* acquire_scratch(int64_t bytes);
void release_scratch(void* memory, int64_t bytes);

// Requests huge pages for memory that has not been touched yet. Otherwise fresh memory costs a page fault per
// 4 KiB, in total more than the kernel itself (48 MiB forward: 3.6 ms instead of 7.8 ms).
void prefer_large_pages(void* memory, int64_t bytes);

// What these cores may have of the processor's last-level cache, in bytes.
int64_t last_level_cache();

}  // namespace cen::cpu
