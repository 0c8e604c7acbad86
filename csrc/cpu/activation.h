// The activations: their names, and their values and gradients on CPU vectors.
//
// To add one, add its name to CEN_FURTHER_ACTIVATIONS, its Formula below and its Activate to
// csrc/cuda/activation.cuh; a name without either does not compile. The backward kernels recompute the
// activation's argument u from x, so a gradient may be any function of u.
//
// This header names no vector type, because problem.h needs the enumeration before an instruction set is
// chosen.
#pragma once

#include <cstdint>
#include <type_traits>

#include "elementary.h"

#define CEN_FURTHER_ACTIVATIONS(X) X(relu6) X(silu) X(gelu) X(gelu_tanh) X(hardswish)
#define CEN_ACTIVATIONS(X) X(identity) X(relu) X(leaky_relu) CEN_FURTHER_ACTIVATIONS(X)

#define CEN_ACTIVATION_INLINE inline __attribute__((always_inline))
// Of what takes far longer than a call: inlined into every kernel, it would double the compile time.
#define CEN_ACTIVATION_CALL __attribute__((noinline))

namespace cen {

#define CEN_ENUMERATOR(name) name,
enum class Activation { CEN_ACTIVATIONS(CEN_ENUMERATOR) };
#undef CEN_ENUMERATOR

namespace cpu {
namespace {

// value(u) is the activation at u, gradient(dy, u) is dy times its derivative at u; V is a vector type.
template <Activation>
struct Formula;

template <>
struct Formula<Activation::relu6> {
  template <class V>
  static CEN_ACTIVATION_INLINE V value(V u) {
    return u < 0 ? V{} : (u > 6 ? V{} + 6 : u);
  }
  template <class V>
  static CEN_ACTIVATION_INLINE V gradient(V dy, V u) {
    return (u > 0) & (u < 6) ? dy : V{};
  }
};

// u within [-most, most]: what multiplies a density there is 0 beyond, where the product could be 0 * inf.
template <class V>
CEN_ACTIVATION_INLINE V within(V u, ElementOf<V> most) {
  return u < -most ? V{} - most : (u > most ? V{} + most : u);
}

template <>
struct Formula<Activation::silu> {
  template <class V>
  static CEN_ACTIVATION_CALL V value(V u) {
    return u * logistic(u);
  }
  template <class V>
  static CEN_ACTIVATION_CALL V gradient(V dy, V u) {
    V slope;
    const V s = logistic(u, &slope);
    return dy * (s + within(u, 100) * slope);
  }
};

// u times the distribution function at u.
template <>
struct Formula<Activation::gelu> {
  template <class V>
  static CEN_ACTIVATION_CALL V value(V u) {
    return u * normal_distribution(u);
  }
  template <class V>
  static CEN_ACTIVATION_CALL V gradient(V dy, V u) {
    const V c = within(u, 20);
    return dy * (normal_distribution(u) + c * bell(c) * ElementOf<V>(0.39894228040143267794));
  }
};

// With 0.5 (1 + tanh(w)) = logistic(2w), w = sqrt(2 / pi) (u + 0.044715 u^3).
template <>
struct Formula<Activation::gelu_tanh> {
  template <class V>
  static CEN_ACTIVATION_INLINE V twice_w(V u) {
    return u * (1 + u * u * ElementOf<V>(0.044715)) * ElementOf<V>(1.59576912160573071176);
  }
  template <class V>
  static CEN_ACTIVATION_CALL V value(V u) {
    return u * logistic(twice_w(u));
  }
  template <class V>
  static CEN_ACTIVATION_CALL V gradient(V dy, V u) {
    using R = ElementOf<V>;
    const V c = within(u, 20);
    V slope;
    const V s = logistic(twice_w(c), &slope);
    return dy * (s + c * slope * (1 + c * c * R(0.134145)) * R(1.59576912160573071176));
  }
};

template <>
struct Formula<Activation::hardswish> {
  template <class V>
  static CEN_ACTIVATION_INLINE V value(V u) {
    return u < -3 ? u * 0 : (u > 3 ? u : u * (u + 3) / 6);
  }
  template <class V>
  static CEN_ACTIVATION_INLINE V gradient(V dy, V u) {
    return u <= -3 ? V{} : (u < 3 ? dy * (u / 3 + ElementOf<V>(0.5)) : dy);
  }
};

// The kernels are instantiated per form instead of per activation, to keep compile time from growing with the
// number of activations: one form without an activation, one for relu and leaky_relu with branch-free inner
// loops, and one that serves every activation with a perfectly predicted branch per vector.
enum class ActivationForm { identity, leaky, any };

// The activation of a call and its parameters, in the type R of the arithmetic.
template <class R>
struct ActivationParameters {
  Activation activation;
  R slope;  // of leaky_relu for negative arguments
  // Bit mask of products with slope: 0 for relu.
  std::conditional_t<sizeof(R) == 4, int32_t, int64_t> product_mask;

  ActivationParameters(Activation activation, double negative_slope)
      : activation(activation),
        slope(static_cast<R>(negative_slope)),
        product_mask(activation == Activation::relu ? 0 : -1) {}
};

// The counterpart of Formula for one form. gradient() takes u as a function, called only if it needs u.
template <class V, ActivationForm>
struct Activate;

template <class V>
struct Activate<V, ActivationForm::identity> {
  template <class R>
  CEN_ACTIVATION_INLINE explicit Activate(const ActivationParameters<R>&) {}

  CEN_ACTIVATION_INLINE V value(V u) const { return u; }
  template <class U>
  CEN_ACTIVATION_INLINE V gradient(V dy, U) const {
    return dy;
  }
};

template <class V>
struct Activate<V, ActivationForm::leaky> {
  using Mask = decltype(V{} < V{});
  V slope;
  Mask product_mask;

  template <class R>
  CEN_ACTIVATION_INLINE explicit Activate(const ActivationParameters<R>& p)
      : slope(p.slope - V{}), product_mask(p.product_mask - Mask{}) {}

  // Masking the bits makes relu give +0 even for infinite v.
  CEN_ACTIVATION_INLINE V scaled(V v) const { return (V)((Mask)(v * slope) & product_mask); }

  CEN_ACTIVATION_INLINE V value(V u) const { return u < 0 ? scaled(u) : u; }
  template <class U>
  CEN_ACTIVATION_INLINE V gradient(V dy, U u) const {
    return u() > 0 ? dy : scaled(dy);
  }
};

template <class V>
struct Activate<V, ActivationForm::any> {
  Activation activation;
  Activate<V, ActivationForm::leaky> leaky;

  template <class R>
  CEN_ACTIVATION_INLINE explicit Activate(const ActivationParameters<R>& p)
      : activation(p.activation), leaky(p) {}

  CEN_ACTIVATION_INLINE V value(V u) const {
    switch (activation) {
      case Activation::identity:
        return u;
      case Activation::relu:
      case Activation::leaky_relu:
        return leaky.value(u);
#define CEN_VALUE(name)  \
  case Activation::name: \
    return Formula<Activation::name>::value(u);
        CEN_FURTHER_ACTIVATIONS(CEN_VALUE)
#undef CEN_VALUE
    }
    __builtin_unreachable();
  }
  template <class U>
  CEN_ACTIVATION_INLINE V gradient(V dy, U u) const {
    switch (activation) {
      case Activation::identity:
        return dy;
      case Activation::relu:
      case Activation::leaky_relu:
        return leaky.gradient(dy, u);
#define CEN_GRADIENT(name) \
  case Activation::name:   \
    return Formula<Activation::name>::gradient(dy, u());
        CEN_FURTHER_ACTIVATIONS(CEN_GRADIENT)
#undef CEN_GRADIENT
    }
    __builtin_unreachable();
  }
};
#undef CEN_ACTIVATION_INLINE
#undef CEN_ACTIVATION_CALL

}  // namespace
}  // namespace cpu
}  // namespace cen
