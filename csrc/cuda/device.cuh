// The device primitives that kernels use: CUDA's under nvcc, else those of tests/host_cuda/host_device.h,
// which simulates blocks, clusters and barriers on the CPU for tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../problem.h"
#include "launch.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define CEN_KERNEL __global__
#define CEN_DEVICE __device__ __forceinline__
#define CEN_HOST_DEVICE __host__ __device__ __forceinline__
#define CEN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define CEN_PARAMETER const __grid_constant__
#define CEN_UNROLL _Pragma("unroll")
#define CEN_UNROLL_1 _Pragma("unroll 1")
#define CEN_UNROLL_4 _Pragma("unroll 4")

namespace cen::cuda {

struct Index3 {
  int x, y;
};

CEN_DEVICE Index3 thread_index() { return {int(threadIdx.x), int(threadIdx.y)}; }
CEN_DEVICE Index3 block_threads() { return {int(blockDim.x), int(blockDim.y)}; }
CEN_DEVICE int64_t block_index() { return blockIdx.x; }

CEN_DEVICE void* shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

CEN_DEVICE void sync_threads() { __syncthreads(); }

// Clusters exist from compute capability 9.0 on; on older devices a block is its own cluster.
CEN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
CEN_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// Maps an address in shared memory to the same one in another block of the cluster.
template <class P>
CEN_DEVICE P* of_rank(P* shared, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}
CEN_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

CEN_DEVICE void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
CEN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the thread's committed groups of copies are in flight.
template <int kPending>
CEN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

CEN_DEVICE float to_real(Half v) { return __half2float(__ushort_as_half(v.bits)); }
CEN_DEVICE float to_real(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
CEN_DEVICE void from_real(float v, Half& to) { to.bits = __half_as_ushort(__float2half_rn(v)); }
CEN_DEVICE void from_real(float v, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }

// One 16-byte access to device memory; the compiler would split a copy of a struct.
CEN_DEVICE void load16(void* to, const void* global) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(global);
}
CEN_DEVICE void store16(void* global, const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("cen_ext: ") + what + ": " + cudaGetErrorString(error));
}

// The CUDA launch configuration of a Launch.
struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute attributes[2];

  explicit LaunchConfig(const Launch& l) : cudaLaunchConfig_t{} {
    gridDim = dim3(unsigned(l.blocks));
    blockDim = dim3(l.threads_x, l.threads_y);
    dynamicSmemBytes = l.shared_bytes;
    stream = static_cast<cudaStream_t>(l.stream);
    attrs = attributes;
    if (l.cluster > 1) {
      attributes[numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[numAttrs].val.clusterDim.x = l.cluster;
      attributes[numAttrs].val.clusterDim.y = attributes[numAttrs].val.clusterDim.z = 1;
      ++numAttrs;
    }
    if (l.cooperative) {
      attributes[numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[numAttrs++].val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <class Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  constexpr int64_t kAlways = 48 << 10;  // available without opting in
  if (bytes > kAlways)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
          "shared memory");
}

// Blocks (or clusters, if any) of such a launch that can be resident at once on the device, which may be
// shared or partitioned. Queried once per kernel and shape.
int64_t max_active(const void* kernel, const Launch& l);

// Whether a cluster fits on the device, and all blocks of a cooperative launch can be resident at once.
template <class Kernel>
bool can_run(Kernel kernel, const Launch& l) {
  allow_shared_memory(kernel, l.shared_bytes);
  const int64_t running = max_active(reinterpret_cast<const void*>(kernel), l);
  return running >= (l.cooperative ? l.blocks : 1);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& l, A... arguments) {
  allow_shared_memory(kernel, l.shared_bytes);
  const LaunchConfig config(l);
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "launch");
}

}  // namespace cen::cuda
#else
#include "host_device.h"
#endif

namespace cen::cuda {

CEN_DEVICE float to_real(float v) { return v; }
CEN_DEVICE double to_real(double v) { return v; }
CEN_DEVICE void from_real(float v, float& to) { to = v; }
CEN_DEVICE void from_real(double v, double& to) { to = v; }

// Values of T per 16-byte vector.
template <class T>
constexpr int kVecSize = 16 / sizeof(T);

template <class T>
struct alignas(16) Vec {
  T element[kVecSize<T>];
};

template <class R, int n>
struct Array {
  R element[n];
};

template <class T>
using RealVec = Array<Real<T>, kVecSize<T>>;

template <class T>
CEN_DEVICE Vec<T> load_vec(const T* from) {
  Vec<T> vec;
  load16(&vec, from);
  return vec;
}

template <class T>
CEN_DEVICE void store_vec(T* to, const Vec<T>& vec) {
  store16(to, &vec);
}

template <class T>
CEN_DEVICE RealVec<T> widen(const Vec<T>& vec) {
  RealVec<T> v;
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = to_real(vec.element[l]);
  return v;
}

template <class T>
CEN_DEVICE Vec<T> narrow(const RealVec<T>& v) {
  Vec<T> vec;
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l) from_real(v.element[l], vec.element[l]);
  return vec;
}

}  // namespace cen::cuda
