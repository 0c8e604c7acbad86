// The CPU kernels, compiled once an instruction set and picked at run time.
#pragma once

#include "../problem.h"

namespace cen::cpu {

// How kernels use the cores: run() calls body(context, begin, end) for ranges that cover [0, tasks), each on
// any thread. Results never depend on the number of threads: reductions are cut by sizes alone.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// A call of max pooling (max_pool_same.h).
struct Pooling {
  int64_t images;         // N channels last, else N * C, one after the other
  int64_t rows, length;   // of an image; values of a row
  int64_t step;           // from a pixel of a row to the next, in values: C channels last, else 1
  int64_t size;           // of the window: odd, at most 15
  bool streaming_stores;  // results are large: store them past the caches

  constexpr int64_t radius() const { return size / 2; }
  constexpr int64_t halo() const { return radius() * step; }  // values on either side that windows reach
};

// A 3x3 convolution of stride 1 that keeps the images' size (conv3x3/conv3x3.h). Images are [images, rows,
// columns, channels], kernels [outputs, 3, 3, inputs], both kinds of channels multiples of 32.
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
};

struct Kernels : KernelsOf<float>, KernelsOf<double>, KernelsOf<Half>, KernelsOf<BFloat16> {
  // bias may be null.
  void (*convolve)(const Convolution&, const float* x, const float* weight, const float* bias, float* y,
                   const Parallel&);
  void (*convolve_backward)(const Convolution&, const float* dy, const float* weight, float* dx,
                            const Parallel&);
  void (*convolve_weight_gradient)(const Convolution&, const float* dy, const float* x, float* dweight,
                                   const Parallel&);
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool supported;  // by this processor
};

#if defined(__x86_64__)
constexpr int kInstructionSets = 3;
#else
constexpr int kInstructionSets = 1;
#endif

// What this build holds, best last.
const InstructionSet* instruction_sets();

// The best that this processor runs, and at most what the environment variable CEN_EXT_CPU_CAPABILITY names.
// Decided at the first call. Throws std::runtime_error if the variable names none that runs here.
const InstructionSet& instruction_set();

// running = (1 - momentum) * running + momentum * batch, with the unbiased variance, and with the average of
// the groups' statistics: [units, C] into [M, C].
template <class R>
void update_running(const Problem& p, const R* batch_mean, const R* batch_var, R* running_mean,
                    R* running_var);

// Scratch memory, aligned to 64 bytes, not initialised. What is given back is kept for this thread's next
// call, up to a limit: the C library would return blocks of this size to the system, and page faults at every
// call cost a small layer a tenth of its time.
void* take_scratch(int64_t bytes);
void give_scratch(void* memory, int64_t bytes);

// Asks for large pages where memory of a result has not been touched yet: fresh memory costs a page fault
// every 4 KiB otherwise, in all longer than the kernel takes (48 MiB forward: 3.6 ms instead of 7.8).
void prefer_large_pages(void* memory, int64_t bytes);

// Bytes of this processor's last level of cache.
int64_t last_level_cache();

}  // namespace cen::cpu
