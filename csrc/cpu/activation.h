// The activations: their names, and what the CPU computes of each, a vector at a time.
//
// To add one, add its name to CEN_FURTHER_ACTIVATIONS and its Formula below, and what CUDA computes of it to
// csrc/cuda/activation.cuh; a name without either does not compile. The backward kernels compute the
// argument u again from x, so a gradient may depend on it in any way.
//
// No vector type is named here, since the enumeration must be known where no instruction set has been chosen.
#pragma once

#include <cstdint>
#include <type_traits>

#define CEN_FURTHER_ACTIVATIONS(X) X(relu6)
#define CEN_ACTIVATIONS(X) X(identity) X(relu) X(leaky_relu) CEN_FURTHER_ACTIVATIONS(X)

#define CEN_ACTIVATION_INLINE inline __attribute__((always_inline))

namespace cen {

#define CEN_ENUMERATOR(name) name,
enum class Activation { CEN_ACTIVATIONS(CEN_ENUMERATOR) };
#undef CEN_ENUMERATOR

namespace cpu {
namespace {

// value(u) is the activation at u, gradient(dy, u) is dy times the derivative at u; V is a vector.
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

// The kernels have an instance per form rather than per activation, which would take as many times as long to
// compile: one without an activation, one for relu and leaky_relu whose inner loops do not branch, and one
// for all others that branches once per vector, always the same way.
enum class ActivationForm { identity, leaky, formula };

constexpr ActivationForm form_of(Activation activation) {
  switch (activation) {
    case Activation::identity:
      return ActivationForm::identity;
    case Activation::relu:
    case Activation::leaky_relu:
      return ActivationForm::leaky;
    default:
      return ActivationForm::formula;
  }
}

// What a call says of its activation, in the type R of its computations.
template <class R>
struct ActivationParameters {
  Activation activation;
  R slope;                                                    // on the negative side, of leaky_relu
  std::conditional_t<sizeof(R) == 4, int32_t, int64_t> kept;  // bits of the product with it: relu keeps none

  ActivationParameters(Activation activation, double negative_slope)
      : activation(activation),
        slope(static_cast<R>(negative_slope)),
        kept(activation == Activation::relu ? 0 : -1) {}
};

// As Formula, for one form; here u is a function, called only where the gradient depends on it.
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
  Mask kept;

  template <class R>
  CEN_ACTIVATION_INLINE explicit Activate(const ActivationParameters<R>& p)
      : slope(p.slope - V{}), kept(p.kept - Mask{}) {}

  // Bits are masked so that relu gives +0 even where v is infinite.
  CEN_ACTIVATION_INLINE V scaled(V v) const { return (V)((Mask)(v * slope) & kept); }

  CEN_ACTIVATION_INLINE V value(V u) const { return u < 0 ? scaled(u) : u; }
  template <class U>
  CEN_ACTIVATION_INLINE V gradient(V dy, U u) const {
    return u() > 0 ? dy : scaled(dy);
  }
};

#define CEN_CASE(expression)                          \
  switch (activation) {                               \
    CEN_FURTHER_ACTIVATIONS(expression)               \
    default: /* form_of() gives no other this form */ \
      __builtin_unreachable();                        \
  }

template <class V>
struct Activate<V, ActivationForm::formula> {
  Activation activation;

  template <class R>
  CEN_ACTIVATION_INLINE explicit Activate(const ActivationParameters<R>& p) : activation(p.activation) {}

  CEN_ACTIVATION_INLINE V value(V u) const {
#define CEN_VALUE(name)  \
  case Activation::name: \
    return Formula<Activation::name>::value(u);
    CEN_CASE(CEN_VALUE)
#undef CEN_VALUE
  }
  template <class U>
  CEN_ACTIVATION_INLINE V gradient(V dy, U u) const {
#define CEN_GRADIENT(name) \
  case Activation::name:   \
    return Formula<Activation::name>::gradient(dy, u());
    CEN_CASE(CEN_GRADIENT)
#undef CEN_GRADIENT
  }
};
#undef CEN_CASE
#undef CEN_ACTIVATION_INLINE

}  // namespace
}  // namespace cpu
}  // namespace cen
