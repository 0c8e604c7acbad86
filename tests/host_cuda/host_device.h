// The device primitives for kernels compiled for the host; csrc/cuda/device.cuh includes this in place of
// CUDA. simulator.cpp runs the threads of a launch as fibers, one at a time, each up to its next barrier, in
// an order shuffled with the seed in the environment variable CEN_HOST_CUDA_SEED. Invalid behavior of a
// kernel ends the process with a message on stderr.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../../csrc/problem.h"

#define CEN_KERNEL
#define CEN_DEVICE inline
#define CEN_HOST_DEVICE inline
#define CEN_LAUNCH_BOUNDS(threads, blocks)
#define CEN_PARAMETER const
#define CEN_UNROLL
#define CEN_UNROLL_1
#define CEN_UNROLL_4

namespace cen::cuda {

struct Index3 {
  int x, y;
};

// Coordinates of the running thread.
Index3 thread_index();
Index3 block_threads();
int64_t block_index();
int64_t grid_blocks();
int cluster_rank();
int cluster_size();

// The block's dynamic shared memory: exactly the requested size, aligned to 16 bytes, initialized to NaN.
void* shared_memory();

// Barriers, identified by file and line. All threads of a block, and all blocks of the cluster or grid, must
// arrive at the same one.
void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Copies 16 bytes between addresses aligned to 16. The destination is NaN until the thread has waited for it.
void copy_async16(void* shared, const void* global);
void commit_copies();

namespace simulator {

struct Grid {
  int64_t blocks;
  int threads_x, threads_y;
  int64_t shared_bytes;
  int cluster;
  bool cooperative;
};

// Makes can_run() refuse clusters and cooperative launches, as on a device that is shared with others.
void refuse_together(bool refuse);
bool refuses_together();

// Runs `thread` for every thread of the grid.
void run(const Grid& grid, const std::function<void()>& thread);

void* shared_of_rank(void* shared, int rank);
void wait_copies(int pending);

// Records that the running thread reads or writes memory that others may see; see races.h.
void access(const void* address, int64_t bytes, bool write, const void* place = __builtin_return_address(0));

// Records a 16-byte access and checks its alignment.
void access16(const void* address, bool write, const void* place = __builtin_return_address(0));

}  // namespace simulator

// Maps an address in shared memory to the same one in another block of the cluster.
template <class T>
T* of_rank(T* shared, int rank) {
  return static_cast<T*>(simulator::shared_of_rank(shared, rank));
}

// Waits until at most n of the thread's committed groups of copies are pending.
template <int n>
[[gnu::always_inline]] inline void wait_copies() {
  simulator::wait_copies(n);
}

// One 16-byte access to device memory, aligned to 16 bytes.
inline void load16(void* to, const void* global) {
  simulator::access16(global, false);
  std::memcpy(to, global, 16);
}
inline void store16(void* global, const void* from) {
  simulator::access16(global, true);
  std::memcpy(global, from, 16);
}

// Conversion of half types, rounded to nearest even.
inline float to_real(Half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                                                 (exponent ? exponent : 1) - 25);
  return v.bits >> 15 ? -size : size;
}
inline float to_real(BFloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void from_real(float v, Half& to) {
  uint32_t bits = 0x7fff;
  if (const float size = std::fabs(v); size >= 65520)
    bits = 0x7c00;
  else if (size == size) {
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const float steps = std::nearbyint(std::ldexp(size, 10 - exponent));
    bits = static_cast<uint32_t>((exponent + 14) << 10) + static_cast<uint32_t>(steps);
  }
  to.bits = static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0));
}
inline void from_real(float v, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(v));
  to.bits = static_cast<uint16_t>(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff);
}

// Shape is Launch of csrc/cuda/launch.h.
template <class Kernel, class Shape>
bool can_run(Kernel, const Shape& s) {
  return !simulator::refuses_together() || (s.cluster == 1 && !s.cooperative);
}
template <class Shape, class... P, class... A>
void launch(void (*kernel)(P...), const Shape& s, A... arguments) {
  simulator::run({s.blocks, s.threads_x, s.threads_y, s.shared_bytes, s.cluster, s.cooperative},
                 [&] { kernel(arguments...); });
}

}  // namespace cen::cuda
