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

// Calls f(activate) with the problem's activation. All threads of a launch take the same branch.
template <class R, class F>
CEN_DEVICE void with_activation(const Problem& p, F f) {
#define CEN_CASE(name)   \
  case Activation::name: \
    return f(Activate<Activation::name, R>(p));
  switch (p.activation) { CEN_ACTIVATIONS(CEN_CASE) }
#undef CEN_CASE
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
