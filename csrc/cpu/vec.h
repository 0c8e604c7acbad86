// Vectors of the instruction set that this translation unit is compiled for, and its parallel loop.
//
// Everything below the unnamed namespace in csrc/cpu/*.h has a copy of its own in each translation unit, so
// that the linker can never put one instruction set's code into another's. For the same reason only headers
// of the standard library that were included before the instruction set was chosen may be used, and of them
// nothing that could be emitted as a function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"

#define CEN_INLINE inline __attribute__((always_inline))
#define CEN_INLINE_LAMBDA __attribute__((always_inline))

namespace cen::cpu {
namespace {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(CEN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // what comparing a Vec<T> gives, a lane
template <class T>
constexpr int64_t kLanes = CEN_VECTOR_BYTES / sizeof(T);
template <class T>
using AllLanes = std::integral_constant<int64_t, kLanes<T>>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A vector, or its first n lanes with zeros in the others.
template <class T>
CEN_INLINE Vec<T> load(const T* from, AllLanes<T>) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
CEN_INLINE Vec<T> load(const T* from, int64_t n) {
  Vec<T> v{};
  std::memcpy(&v, from, n * sizeof(T));
  return v;
}
template <class T>
CEN_INLINE Vec<T> load(const T* from) {
  return load(from, AllLanes<T>{});
}

template <class T>
CEN_INLINE void store(T* to, Vec<T> v, AllLanes<T>) {
  std::memcpy(to, &v, sizeof(v));
}
template <class T>
CEN_INLINE void store(T* to, Vec<T> v, int64_t n) {
  std::memcpy(to, &v, n * sizeof(T));
}

template <class T>
CEN_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// Doubles of the w-th part of a vector of T: the lanes [w, w + 1) * kLanes<double>.
template <class T, class N>
CEN_INLINE Vec<double> load_wide(const T* from, int64_t w, N n) {
  typedef T Part __attribute__((vector_size(kLanes<double> * sizeof(T))));
  Part part{};
  if constexpr (std::is_same_v<N, AllLanes<T>>)
    std::memcpy(&part, from + w * kLanes<double>, sizeof(part));
  else
    std::memcpy(&part, from + w * kLanes<double>,
                larger(0, smaller(n - w * kLanes<double>, kLanes<double>)) * sizeof(T));
  return __builtin_convertvector(part, Vec<double>);
}

// v, the w-th part of a vector, with zeros in the lanes from n on.
template <class T, int64_t kAll>
CEN_INLINE T first_lanes(T v, std::integral_constant<int64_t, kAll>, int64_t = 0) {
  return v;
}
template <class T>
CEN_INLINE T first_lanes(T v, int64_t n, int64_t w = 0) {
  constexpr int64_t kCount = sizeof(T) / sizeof(v[0]);
  for (int64_t lane = 0; lane < kCount; ++lane)
    if (w * kCount + lane >= n) v[lane] = 0;
  return v;
}

CEN_INLINE double sum_lanes(Vec<double> v) {
  for (int64_t half = kLanes<double> / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) v[lane] += v[lane + half];
  return v[0];
}
CEN_INLINE double sum_lanes(Vec<float> v) {
  float lanes[kLanes<float>];
  std::memcpy(lanes, &v, sizeof(v));
  return sum_lanes(load_wide(lanes, 0, AllLanes<float>{}) + load_wide(lanes, 1, AllLanes<float>{}));
}

// Zeroed scratch memory, aligned for vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {
    std::memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// f(begin, end) for ranges that cover [0, tasks).
template <class F>
void parallel_ranges(const Parallel& parallel, int64_t tasks, F f) {
  if (parallel.threads == 1 || tasks == 1) return f(int64_t{0}, tasks);
  parallel.run(
      tasks, [](void* body, int64_t begin, int64_t end) { (*static_cast<F*>(body))(begin, end); }, &f);
}

// f(task) for each of [0, tasks).
template <class F>
void parallel_tasks(const Parallel& parallel, int64_t tasks, F f) {
  parallel_ranges(parallel, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

}  // namespace
}  // namespace cen::cpu
