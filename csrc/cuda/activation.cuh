// The activations and their gradients in CUDA, one value at a time; csrc/cpu/activation.h lists their names.
//
// Each has value(u), the activation at u, and kCurved. The backward kernels need the derivative at u more
// than once, but u depends on x of all modalities. If the derivative takes two values only, one bit per value
// records which:
//   passes(u)     whether the derivative is 1,
//   stopped(dy)   dy times the derivative where it is not 1,
//   kExact        whether stopped() is 0, which rounding to a half type does not change.
// A curved activation has gradient(dy, u), dy times the derivative at u, instead, and u is recomputed each
// time.
#pragma once

#include "device.cuh"

namespace cen::cuda {

template <Activation, class R>
struct Activate;

template <class R>
struct Activate<Activation::identity, R> {
  static constexpr bool kCurved = false, kExact = true;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE R value(R u) const { return u; }
  CEN_DEVICE bool passes(R) const { return true; }
  CEN_DEVICE R stopped(R) const { return R(0); }
};

template <class R>
struct Activate<Activation::relu, R> {
  static constexpr bool kCurved = false, kExact = true;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE R value(R u) const { return u < 0 ? R(0) : u; }
  CEN_DEVICE bool passes(R u) const { return u > 0; }
  CEN_DEVICE R stopped(R) const { return R(0); }
};

template <class R>
struct Activate<Activation::leaky_relu, R> {
  static constexpr bool kCurved = false, kExact = false;
  R slope;
  CEN_DEVICE explicit Activate(const Problem& p) : slope(R(p.negative_slope)) {}
  CEN_DEVICE R value(R u) const { return u < 0 ? u * slope : u; }
  CEN_DEVICE bool passes(R u) const { return u > 0; }
  CEN_DEVICE R stopped(R dy) const { return dy * slope; }
};

template <class R>
struct Activate<Activation::relu6, R> {
  static constexpr bool kCurved = false, kExact = true;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE R value(R u) const { return u < 0 ? R(0) : u > 6 ? R(6) : u; }
  CEN_DEVICE bool passes(R u) const { return u > 0 && u < 6; }
  CEN_DEVICE R stopped(R) const { return R(0); }
};

// 1 / (1 + e^-v) and, with the derivative, e^-|v| / (1 + e^-|v|)^2.
template <class R>
CEN_DEVICE R logistic(R v) {
  const R e = std::exp(v < 0 ? v : -v), part = 1 / (1 + e);
  return v < 0 ? e * part : part;
}
template <class R>
CEN_DEVICE R logistic_slope(R v) {
  const R e = std::exp(v < 0 ? v : -v), part = 1 / (1 + e);
  return e * part * part;
}

// u within [-most, most]: what multiplies a density there is 0 beyond, where the product could be 0 * inf.
template <class R>
CEN_DEVICE R within(R u, R most) {
  return u < -most ? -most : u > most ? most : u;
}

template <class R>
struct Activate<Activation::silu, R> {
  static constexpr bool kCurved = true, kExact = false;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE R value(R u) const { return u * logistic(u); }
  CEN_DEVICE R gradient(R dy, R u) const {
    return dy * (logistic(u) + within(u, R(100)) * logistic_slope(u));
  }
};

template <class R>
struct Activate<Activation::gelu, R> {
  static constexpr bool kCurved = true, kExact = false;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE static R distribution(R u) { return R(0.5) + R(0.5) * std::erf(u * R(0.70710678118654752440)); }
  CEN_DEVICE R value(R u) const { return u * distribution(u); }
  CEN_DEVICE R gradient(R dy, R u) const {
    const R c = within(u, R(20));
    return dy * (distribution(u) + c * std::exp(R(-0.5) * c * c) * R(0.39894228040143267794));
  }
};

// With 0.5 (1 + tanh(w)) = logistic(2w), w = sqrt(2 / pi) (u + 0.044715 u^3).
template <class R>
struct Activate<Activation::gelu_tanh, R> {
  static constexpr bool kCurved = true, kExact = false;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE static R twice_w(R u) { return u * (1 + u * u * R(0.044715)) * R(1.59576912160573071176); }
  CEN_DEVICE R value(R u) const { return u * logistic(twice_w(u)); }
  CEN_DEVICE R gradient(R dy, R u) const {
    const R c = within(u, R(20)), w = twice_w(c);
    const R inner = (1 + c * c * R(0.134145)) * R(1.59576912160573071176);
    return dy * (logistic(w) + c * logistic_slope(w) * inner);
  }
};

template <class R>
struct Activate<Activation::hardswish, R> {
  static constexpr bool kCurved = true, kExact = false;
  CEN_DEVICE explicit Activate(const Problem&) {}
  CEN_DEVICE R value(R u) const { return u < -3 ? u * 0 : u > 3 ? u : u * (u + 3) / 6; }
  CEN_DEVICE R gradient(R dy, R u) const { return u <= -3 ? R(0) : u < 3 ? dy * (u / 3 + R(0.5)) : dy; }
};

// Calls f(activate) with the problem's activation. All threads of a launch take the same branch.
template <class R, class F>
CEN_DEVICE void with_activation(const Problem& p, F f) {
#define CEN_CASE(name)   \
  case Activation::name: \
    return f(Activate<Activation::name, R>(p));
  switch (p.activation) { CEN_ACTIVATIONS(CEN_CASE) }
#undef CEN_CASE
}

CEN_HOST_DEVICE constexpr bool is_curved(Activation activation) {
#define CEN_CASE(name)   \
  case Activation::name: \
    return Activate<Activation::name, float>::kCurved;
  switch (activation) { CEN_ACTIVATIONS(CEN_CASE) }
#undef CEN_CASE
  return false;
}

// Whether gradients behind the activation are exact when stored as T: whether dresidual can replace them.
template <class T>
bool keeps_gradient(Activation activation) {
#define CEN_CASE(name)   \
  case Activation::name: \
    return Activate<Activation::name, Real<T>>::kExact || sizeof(T) > 2;
  switch (activation) { CEN_ACTIVATIONS(CEN_CASE) }
#undef CEN_CASE
  return false;
}

}  // namespace cen::cuda
