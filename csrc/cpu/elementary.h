// Elementary functions of CPU vectors: the exponential, the logistic function and the normal distribution.
//
// For floats by polynomials; below 1e-37 the exponential is 0. Measured on v from -86 to 0: the logistic
// function within 4 rounding units of itself, the normal distribution within 8 down to v = -3 and 13 down to
// v = -5, since its exponent is rounded. For doubles by the C library, element by element. NaN stays NaN.
//
// Like activation.h this header names no vector type.
#pragma once

#include <cmath>
#include <cstdint>

#define CEN_ELEMENTARY inline __attribute__((always_inline))

namespace cen::cpu {
namespace {

template <class V>
using ElementOf = decltype(V{}[0] + 0);

template <class V>
constexpr bool kOfFloats = sizeof(ElementOf<V>) == sizeof(float);

template <class V, class F>
CEN_ELEMENTARY V map_elements(V v, F f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(v[i]);
  return v;
}

// e^v for v <= 0.
template <class V>
CEN_ELEMENTARY V exp_of_negative(V v) {
  if constexpr (!kOfFloats<V>) {
    return map_elements(v, [](double x) { return __builtin_exp(x); });
  } else {
    using Bits = decltype(V{} < V{});
    const auto vanishes = v < -87.0f;
    v = vanishes ? V{} : v;
    // v = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 leaves n in the last bits. ln 2 in two parts.
    const V shifted = v * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (v - n * 0.693145752f) - n * 1.42860677e-6f;
    // e^r = 1 + r + r^2 q(r), q fitted for the least relative error, 3e-9.
    V q = r * 1.38146e-3f + 8.36871e-3f;
    q = q * r + 4.166839e-2f;
    q = q * r + 0.16666521f;
    q = q * r + 0.49999993f;
    const V fraction = r * r * q + r + 1.0f;
    return vanishes ? V{} : fraction * (V)(((Bits)shifted << 23) + (127 << 23));
  }
}

// 1 / (1 + e^-v), and its derivative.
template <class V>
CEN_ELEMENTARY V logistic(V v, V* derivative = nullptr) {
  const V e = exp_of_negative(v < 0 ? v : -v), part = 1 / (1 + e);
  if (derivative) *derivative = e * part * part;
  return v < 0 ? e * part : part;
}

// e^(-v^2 / 2), the normal density without its factor.
template <class V>
CEN_ELEMENTARY V bell(V v) {
  return exp_of_negative(v * v * ElementOf<V>(-0.5));
}

// The distribution function of the standard normal distribution.
template <class V>
CEN_ELEMENTARY V normal_distribution(V v) {
  if constexpr (!kOfFloats<V>) {
    return map_elements(v, [](double x) { return 0.5 * __builtin_erfc(x * -0.70710678118654752440); });
  } else {
    // The tail beyond |v| is bell(v) times a function of |v|, here t times a polynomial in t = 1 / (1 + 0.34
    // |v|), fitted for the least relative error, 3e-8.
    const V t = 1 / (1 + (v < 0 ? -v : v) * 0.34f);
    V p = t * -2.6120707e-2f + 0.13950051f;
    p = p * t - 0.27313462f;
    p = p * t + 0.20218456f;
    p = p * t - 4.4719581e-2f;
    p = p * t + 0.11535957f;
    p = p * t + 0.11519757f;
    p = p * t + 0.13611221f;
    p = p * t + 0.1356205f;
    const V tail = bell(v) * t * p;
    return v < 0 ? tail : 1 - tail;
  }
}

#undef CEN_ELEMENTARY

}  // namespace
}  // namespace cen::cpu
