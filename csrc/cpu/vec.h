// SIMD vectors of the instruction set that this translation unit is compiled for, and the parallel loop.
//
// All code of the headers under csrc/cpu is in unnamed namespaces, so every translation unit has its own copy
// and the linker can never substitute the code of another instruction set. For the same reason these headers
// use only standard headers that were included before the instruction set was chosen, and from those nothing
// that could be emitted as a function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define CEN_INLINE inline __attribute__((always_inline))
#define CEN_INLINE_LAMBDA __attribute__((always_inline))

namespace cen::cpu {
namespace {

template <class T, int64_t kBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class R>
using Vec = typename VecOf<R, CEN_VECTOR_BYTES>::type;
// The element type of comparisons of Vec<R>.
template <class R>
using Bits = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
template <class R>
constexpr int64_t kVecSize = CEN_VECTOR_BYTES / sizeof(R);
template <class R>
using FullVec = std::integral_constant<int64_t, kVecSize<R>>;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class R>
CEN_INLINE Vec<R> splat(R value) {
  return value - Vec<R>{};  // compilers fold x - 0, but not x + 0, which turns -0 into +0
}

// ---- memory: Packed<T> holds as many values of type T as a vector of Real<T> has elements ----

template <class T>
constexpr int64_t kPackedBytes = kVecSize<Real<T>> * sizeof(T);
template <class T>
using Packed = typename VecOf<std::conditional_t<sizeof(T) == 2, uint16_t, T>, kPackedBytes<T>>::type;

// A vector at any address, among values of any type. GCC makes plain moves of it; copies by memcpy went
// through the stack in large kernels.
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V vector;
};
template <class V>
CEN_INLINE V load_unaligned(const void* from) {
  return static_cast<const Unaligned<V>*>(from)->vector;
}
template <class V>
CEN_INLINE void store_unaligned(void* to, V vector) {
  static_cast<Unaligned<V>*>(to)->vector = vector;
}

template <class T>
CEN_INLINE Packed<T> load_packed(const T* from, FullVec<Real<T>>) {
  return load_unaligned<Packed<T>>(from);
}
template <class T>
CEN_INLINE void store_packed(T* to, Packed<T> packed, FullVec<Real<T>>) {
  store_unaligned(to, packed);
}

// Access to the first n elements only. Loads set the others to zero; stores leave their memory unchanged.
#if CEN_VECTOR_BYTES == 64
template <class T>
CEN_INLINE Packed<T> load_packed(const T* from, int64_t n) {
  const auto mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2)
    return (Packed<T>)_mm256_maskz_loadu_epi16(mask, from);
  else if constexpr (sizeof(T) == 4)
    return (Packed<T>)_mm512_maskz_loadu_epi32(mask, from);
  else
    return (Packed<T>)_mm512_maskz_loadu_epi64(mask, from);
}
template <class T>
CEN_INLINE void store_packed(T* to, Packed<T> packed, int64_t n) {
  const auto mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(to, mask, (__m256i)packed);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(to, mask, (__m512i)packed);
  else
    _mm512_mask_storeu_epi64(to, mask, (__m512i)packed);
}
#else
// Calls, because ends of rows are rare: inlined into every kernel, these loops took most of the compile time.
template <class T>
__attribute__((noinline)) Packed<T> load_packed(const T* from, int64_t n) {
  T elements[kVecSize<Real<T>>] = {};
  for (int64_t element = 0; element < n; ++element) elements[element] = from[element];
  return load_packed(elements, FullVec<Real<T>>{});
}
template <class T>
__attribute__((noinline)) void store_packed(T* to, Packed<T> packed, int64_t n) {
  T elements[kVecSize<Real<T>>];
  store_packed(elements, packed, FullVec<Real<T>>{});
  for (int64_t element = 0; element < n; ++element) to[element] = elements[element];
}
#endif

// The offset of a value from the preceding address aligned to kPackedBytes<T>, in values.
template <class T>
CEN_INLINE int64_t phase_of(const T* value) {
  return reinterpret_cast<uintptr_t>(value) / sizeof(T) % kVecSize<Real<T>>;
}

// Non-temporal store to an address aligned to kPackedBytes<T>.
template <class T>
CEN_INLINE void stream_packed(T* to, Packed<T> packed) {
#if defined(__x86_64__)
  if constexpr (sizeof(packed) == 8)
    _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)packed);
  else if constexpr (sizeof(packed) == 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)packed);
#if CEN_VECTOR_BYTES >= 32
  else if constexpr (sizeof(packed) == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)packed);
#endif
#if CEN_VECTOR_BYTES == 64
  else
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)packed);
#endif
#else
  store_packed(to, packed, FullVec<Real<T>>{});
#endif
}

// ---- half types: widened to float, and rounded to nearest even when narrowed ----

using Floats = Vec<float>;
using UInts = Vec<uint32_t>;

// Widens 16 bits to 32. Where there is an instruction for it, GCC 12 makes four of __builtin_convertvector.
CEN_INLINE UInts extend(Packed<BFloat16> packed) {
#if CEN_VECTOR_BYTES == 64
  return (UInts)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)packed);
#elif CEN_VECTOR_BYTES == 32
  return (UInts)_mm256_cvtepu16_epi32((__m128i)packed);
#else
  return __builtin_convertvector(packed, UInts);
#endif
}
CEN_INLINE Floats widen(Packed<BFloat16> packed, BFloat16) { return (Floats)(extend(packed) << 16); }
CEN_INLINE Packed<BFloat16> narrow(Floats v, BFloat16) {
  const UInts bits = (UInts)v;
  const UInts rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const UInts quiet = bits | 0x400000;  // keeps NaN a NaN when its low bits are cut off
  const UInts high = (v == v ? rounded : quiet) >> 16;
  // Here, too, the compiler's conversion takes more instructions.
#if CEN_VECTOR_BYTES == 64
  return (Packed<BFloat16>)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)high);
#elif CEN_VECTOR_BYTES == 32
  const __m256i parts = (__m256i)high;
  return (Packed<BFloat16>)_mm_packus_epi32(_mm256_castsi256_si128(parts),
                                            _mm256_extracti128_si256(parts, 1));
#else
  return __builtin_convertvector(high, Packed<BFloat16>);
#endif
}

#if CEN_VECTOR_BYTES == 64
CEN_INLINE Floats widen(Packed<Half> packed, Half) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)packed);
}
CEN_INLINE Packed<Half> narrow(Floats v, Half) {
  return (Packed<Half>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif CEN_VECTOR_BYTES == 32
CEN_INLINE Floats widen(Packed<Half> packed, Half) { return (Floats)_mm256_cvtph_ps((__m128i)packed); }
CEN_INLINE Packed<Half> narrow(Floats v, Half) {
  return (Packed<Half>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
CEN_INLINE Floats widen(Packed<Half> packed, Half) {
  const UInts bits = __builtin_convertvector(packed, UInts);
  // The exponent biases differ by 112. Multiplying by 2^112 handles denormal values, too.
  const UInts finite = (UInts)((Floats)((bits & 0x7fff) << 13) * 0x1p112f);
  const UInts magnitude = (bits & 0x7c00) == 0x7c00 ? finite | 0x7f800000 : finite;
  return (Floats)(magnitude | (bits & 0x8000) << 16);
}
CEN_INLINE Packed<Half> narrow(Floats v, Half) {
  const UInts bits = (UInts)v, magnitude = bits & 0x7fffffff;
  const UInts normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const UInts denormal = (UInts)((Floats)magnitude + 0.5f) - (126u << 23);  // the ulp of 0.5 is 2^-24
  const UInts finite = magnitude < (113u << 23) ? denormal : normal;
  const UInts infinite = magnitude > (255u << 23) ? UInts{} + 0x7e00 : UInts{} + 0x7c00;
  const UInts half = magnitude < (143u << 23) ? finite : infinite;
  return __builtin_convertvector(half | (bits & 0x80000000) >> 16, Packed<Half>);
}
#endif

template <class T, class N>
CEN_INLINE Vec<Real<T>> load(const T* from, N n) {
  if constexpr (sizeof(T) == 2)
    return widen(load_packed(from, n), T{});
  else
    return load_packed(from, n);
}
template <class T>
CEN_INLINE Packed<T> pack(Vec<Real<T>> v) {
  if constexpr (sizeof(T) == 2)
    return narrow(v, T{});
  else
    return v;
}
template <class T>
CEN_INLINE void store(T* to, Vec<Real<T>> v, int64_t n, bool) {
  store_packed(to, pack<T>(v), n);
}
// A streamed store is non-temporal and requires `to` to be aligned to kPackedBytes<T>.
template <class T>
CEN_INLINE void store(T* to, Vec<Real<T>> v, FullVec<Real<T>> n, bool streamed) {
  if (streamed)
    stream_packed(to, pack<T>(v));
  else
    store_packed(to, pack<T>(v), n);
}

// Loads a vector from a table of coefficients or masks.
template <class R>
CEN_INLINE Vec<R> load_row(const R* from) {
  return load_unaligned<Vec<R>>(from);
}

template <class R>
CEN_INLINE void store_row(R* to, Vec<R> v) {
  store_unaligned(to, v);
}

// Converts a, b and c to vectors of doubles and calls f(element, parts...) for each; `element` is the index
// of a part's first element.
template <class F>
CEN_INLINE void for_wide_parts(F f, Vec<double> a, Vec<double> b, Vec<double> c) {
  f(int64_t{0}, a, b, c);
}
template <class F>
CEN_INLINE void for_wide_parts(F f, Vec<float> a, Vec<float> b, Vec<float> c) {
  typedef float Part __attribute__((vector_size(CEN_VECTOR_BYTES / 2)));
  const auto part = [](const Vec<float>& v, int64_t element) CEN_INLINE_LAMBDA {
    Part p;
    std::memcpy(&p, reinterpret_cast<const char*>(&v) + element * sizeof(float), sizeof(p));
    return __builtin_convertvector(p, Vec<double>);
  };
  for (int64_t element = 0; element < kVecSize<float>; element += kVecSize<double>)
    f(element, part(a, element), part(b, element), part(c, element));
}

// Returns v with elements n and up set to zero.
template <class R>
CEN_INLINE Vec<R> first_elements(Vec<R> v, FullVec<R>) {
  return v;
}
template <class R>
CEN_INLINE Vec<R> first_elements(Vec<R> v, int64_t n) {
  static constexpr Bits<R> kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_row(kCount) < splat(static_cast<Bits<R>>(n)) ? v : Vec<R>{};
}

CEN_INLINE double sum_elements(Vec<double> v) {
  for (int64_t half = kVecSize<double> / 2; half > 0; half /= 2)
    for (int64_t element = 0; element < half; ++element) v[element] += v[element + half];
  return v[0];
}
CEN_INLINE double sum_elements(Vec<float> v) {
  typedef float Part __attribute__((vector_size(CEN_VECTOR_BYTES / 2)));
  Part parts[2];
  std::memcpy(parts, &v, sizeof(v));
  return sum_elements(__builtin_convertvector(parts[0], Vec<double>) +
                      __builtin_convertvector(parts[1], Vec<double>));
}

// The same in R, which is faster. By halves: compilers make a loop over memory of more than a few elements.
template <class R, int64_t kBytes = CEN_VECTOR_BYTES>
CEN_INLINE R add_elements(typename VecOf<R, kBytes>::type v) {
  if constexpr (kBytes == 2 * sizeof(R)) {
    return v[0] + v[1];
  } else {
    typename VecOf<R, kBytes / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return add_elements<R, kBytes / 2>(halves[0] + halves[1]);
  }
}

// Uninitialized scratch memory for `size` values.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : bytes_(size * sizeof(T)), data_(static_cast<T*>(acquire_scratch(bytes_))) {}
  ~Buffer() { release_scratch(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  const int64_t bytes_;
  T* const data_;
};

// Calls f(begin, end) for ranges that cover [0, tasks), in parallel.
template <class F>
void parallel_ranges(const Parallel& parallel, int64_t tasks, F f) {
  const auto range = [&f](int64_t begin, int64_t end) {
    f(begin, end);
#if defined(__x86_64__)
    _mm_sfence();  // makes non-temporal stores visible before the range counts as done
#endif
  };
  if (parallel.threads == 1 || tasks == 1) return range(0, tasks);
  parallel.run(
      tasks,
      [](void* body, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<decltype(range)>*>(body))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&range)));
}

// Calls f(task) for every task of [0, tasks), in parallel.
template <class F>
void parallel_tasks(const Parallel& parallel, int64_t tasks, F f) {
  parallel_ranges(parallel, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

}  // namespace
}  // namespace cen::cpu
