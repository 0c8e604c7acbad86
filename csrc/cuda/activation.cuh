// What CUDA computes of each activation, one value at a time; csrc/cpu/activation.h holds their names.
//
// Each has value(u), the activation at u, and kCurved. The backward kernels need the derivative at u more
// than once, and u costs all modalities' x. Where a derivative is one of two factors, one bit per value keeps
// which:
//   passes(u)     whether the derivative is 1,
//   stopped(dy)   dy times the derivative where it is not,
//   kExact        whether that is 0, which rounding to a half type does not change.
// A curved one has gradient(dy, u) instead, dy times the derivative at u, and u is computed each time.
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

// f(activate) with the call's activation. All threads of a launch take the same branch.
template <class R, class F>
CEN_DEVICE void with_activation(const Problem& p, F f) {
#define CEN_CASE(name)   \
  case Activation::name: \
    return f(Activate<Activation::name, R>(p));
  switch (p.activation) { CEN_ACTIVATIONS(CEN_CASE) }
#undef CEN_CASE
}

// Whether a gradient that is stored as T, which may round it, still is what it was.
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
