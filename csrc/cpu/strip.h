// The operator on vectors of values: cen_ext/reference.py, one vector of x at a time.
//
// A strip is a set of vectors, at the same places in every modality, that share their channels: the values of
// one channel (channels first; every lane has the same channel), or one vector of channels down the pixels
// (channels last). Coefficients stay in registers throughout a strip, and the code is the same for both.
#pragma once

#include "vec.h"

namespace cen::cpu {
namespace {

// What the kernels need of weight, bias and statistics: z = (x - shift) * scale + offset, a row a modality.
// shift is the mean rounded to T and offset makes up for the rounding, so that z keeps its accuracy where
// the mean is large against the deviation.
template <class T>
struct Tables {
  const int64_t padded;  // channels a row, at least one vector
  const T per_other;     // 1 / (M - 1)
  Buffer<T> shift, scale, offset;
  Buffer<Bits<T>> replaced;  // -1 where the exchange replaces the channel, else 0
  Buffer<Bits<T>> dead;      // -1 where furthermore no other modality borrows it: x has no part in y

  explicit Tables(const Problem& p)
      : padded(larger(p.channels, kLanes<T>)),
        per_other(p.modalities > 1 ? T(1) / T(p.modalities - 1) : T(0)),
        shift(p.modalities * padded),
        scale(p.modalities * padded),
        offset(p.modalities * padded),
        replaced(p.modalities * padded),
        dead(p.modalities * padded) {}

  void set_exchange(const Problem& p, const T* weight) {
    for (int64_t c = 0; c < p.channels; ++c) {
      int64_t count = 0;
      for (int64_t m = 0; m < p.modalities; ++m) {
        const bool gone = is_replaced(p, weight[m * p.channels + c], m, c);
        replaced[m * padded + c] = gone ? -1 : 0;
        count += gone;
      }
      for (int64_t m = 0; m < p.modalities; ++m)
        dead[m * padded + c] = count == 1 ? replaced[m * padded + c] : 0;
    }
  }

  void set_affine(int64_t m, int64_t c, double mean, double invstd, T weight, T bias) {
    const int64_t i = m * padded + c;
    const double a = invstd * weight;
    shift[i] = static_cast<T>(mean);
    scale[i] = static_cast<T>(a);
    offset[i] = static_cast<T>(bias - (mean - shift[i]) * a);
  }
};

inline double inverse_std(double var, double eps) { return 1 / std::sqrt(var + eps); }

// How a strip takes part in the exchange: not at all; with M = 2, where the other modality's coefficients
// stay in registers too; with any M.
enum class Exchange { none, pair, general };

// One modality along a strip.
template <class T, bool kChannelsLast>
struct Side {
  using Mask = std::conditional_t<kChannelsLast, Vec<Bits<T>>, bool>;

  const T *x, *residual, *dy;  // the strip's first value; residual may be null, dy is in the forward pass
  Vec<T> shift, scale, offset;
  Mask replaced;

  template <class N>
  CEN_INLINE Vec<T> centred(int64_t at, N n) const {
    return load(x + at, n) - shift;
  }
  template <class N>
  CEN_INLINE Vec<T> z(int64_t at, N n) const {
    return centred(at, n) * scale + offset;
  }
};

template <class T, bool kChannelsLast, Activation kActivation, Exchange kExchange>
struct Strip {
  using Mask = typename Side<T, kChannelsLast>::Mask;

  const Problem& problem;
  const Tables<T>& tables;
  const T *x, *residual, *dy;  // the strip's first value in modality 0
  const int64_t channel, m;
  const T negative_slope = static_cast<T>(problem.negative_slope);
  const Side<T, kChannelsLast> own = side(m), next = side(kExchange == Exchange::pair ? 1 - m : m);
  const Mask dead = mask(tables.dead, m);

  CEN_INLINE Vec<T> coefficient(const Buffer<T>& table, int64_t m) const {
    const T* at = table.get() + m * tables.padded + channel;
    if constexpr (kChannelsLast)
      return load(at);
    else
      return splat(*at);
  }

  CEN_INLINE Mask mask(const Buffer<Bits<T>>& table, int64_t m) const {
    const Bits<T>* at = table.get() + m * tables.padded + channel;
    if constexpr (kChannelsLast)
      return load(at);
    else
      return *at != 0;
  }

  CEN_INLINE Side<T, kChannelsLast> side(int64_t m) const {
    const int64_t skip = m * problem.modality_size();
    return {x + skip,
            residual ? residual + skip : nullptr,
            dy ? dy + skip : nullptr,
            coefficient(tables.shift, m),
            coefficient(tables.scale, m),
            coefficient(tables.offset, m),
            mask(tables.replaced, m)};
  }

  CEN_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(own.x + at);
    if (own.dy) __builtin_prefetch(own.dy + at);
  }

  // The mean of the z of all modalities but m.
  template <class N>
  CEN_INLINE Vec<T> mean_without(int64_t m, int64_t at, N n) const {
    Vec<T> sum{};
    for (int64_t other = 0; other < problem.modalities; ++other)
      if (other != m) sum += side(other).z(at, n);
    return sum * tables.per_other;
  }

  // After the exchange and the residual, in the modality that `s` is; `others` gives what replaces its z.
  template <class N, class Others>
  CEN_INLINE Vec<T> u(const Side<T, kChannelsLast>& s, int64_t at, N n, Others others) const {
    Vec<T> v;
    if constexpr (kExchange == Exchange::none)
      v = s.z(at, n);
    else
      v = s.replaced ? others() : s.z(at, n);
    return s.residual ? v + load(s.residual + at, n) : v;
  }
  template <class N>
  CEN_INLINE Vec<T> u(int64_t at, N n) const {
    return u(own, at, n, [&] {
      if constexpr (kExchange == Exchange::pair)
        return next.z(at, n);
      else
        return mean_without(m, at, n);
    });
  }

  template <class N>
  CEN_INLINE Vec<T> y(int64_t at, N n) const {
    const Vec<T> v = u(at, n);
    if constexpr (kActivation == Activation::identity) return v;
    if constexpr (kActivation == Activation::relu) return v < 0 ? Vec<T>{} : v;
    return v < 0 ? v * negative_slope : v;
  }

  // dy * activation'(u), the residual's gradient; u() is not called where it is not needed.
  template <class N, class U>
  CEN_INLINE Vec<T> g(const Side<T, kChannelsLast>& s, int64_t at, N n, U u) const {
    const Vec<T> d = load(s.dy + at, n);
    if constexpr (kActivation == Activation::identity) return d;
    const Vec<T> v = u();
    if constexpr (kActivation == Activation::relu) return v > 0 ? d : Vec<T>{};
    return v > 0 ? d : d * negative_slope;
  }
  template <class N>
  CEN_INLINE Vec<T> g(int64_t at, N n) const {
    return g(own, at, n, [&] { return u(at, n); });
  }

  // The gradient of z before the exchange: g of its own place, and of those that borrow it.
  template <class N>
  CEN_INLINE Vec<T> dz(Vec<T> own_g, int64_t at, N n) const {
    const Vec<T> zero{};
    if constexpr (kExchange == Exchange::none) return own_g;
    Vec<T> d = own.replaced ? zero : own_g;
    const auto add_borrower = [&](const Side<T, kChannelsLast>& s, auto others) {
      d += s.replaced ? tables.per_other * g(s, at, n, [&] { return u(s, at, n, others); }) : zero;
    };
    if constexpr (kExchange == Exchange::pair) {
      add_borrower(next, [&] { return own.z(at, n); });
    } else {
      for (int64_t other = 0; other < problem.modalities; ++other)
        if (other != m) add_borrower(side(other), [&] { return mean_without(other, at, n); });
    }
    return d;
  }

  // x - shift, and 0 where x has no part in y.
  template <class N>
  CEN_INLINE Vec<T> centred(int64_t at, N n) const {
    if constexpr (kExchange == Exchange::none) return own.centred(at, n);
    const Vec<T> zero{};
    return dead ? zero : own.centred(at, n);
  }
};

// Whether row m of a mask is set in any lane of a strip.
template <class T, bool kChannelsLast>
CEN_INLINE bool any_lane(const Tables<T>& tables, const Buffer<Bits<T>>& mask, int64_t m, int64_t channel) {
  const Bits<T>* at = mask.get() + m * tables.padded + channel;
  Bits<T> found = 0;
  for (int64_t lane = 0; lane < (kChannelsLast ? kLanes<T> : 1); ++lane) found |= at[lane];
  return found;
}

// f(exchange) with what the strip needs as a compile-time constant.
template <class F>
CEN_INLINE void with_exchange(const Problem& p, bool any_replaced, F f) {
  if (!any_replaced)
    f(std::integral_constant<Exchange, Exchange::none>{});
  else if (p.modalities == 2)
    f(std::integral_constant<Exchange, Exchange::pair>{});
  else
    f(std::integral_constant<Exchange, Exchange::general>{});
}

// f(activation) with the activation as a compile-time constant.
template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity:
      return f(std::integral_constant<Activation, Activation::identity>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::leaky_relu:
      return f(std::integral_constant<Activation, Activation::leaky_relu>{});
  }
}

}  // namespace
}  // namespace cen::cpu
