// The operator on one vector of values: cen_ext/reference.py, a line of memory at a time.
//
// A line is a run of values that lie next to each other in x, taken in every modality at the same place:
// spatial values of one channel (channels first), or all channels of one pixel (channels last). The code is
// the same for both; in the first a coefficient is one number for the line, in the second one a lane.
#pragma once

#include "vec.h"

namespace cen::cpu {
namespace {

// What the kernels need of weight, bias and statistics: z = (x - shift) * scale + offset, a row a modality.
// shift is the mean rounded to T and offset makes up for the rounding, so that z keeps its accuracy where
// the mean is large against the deviation.
template <class T>
struct Tables {
  const int64_t padded;  // channels a row, filled up to whole vectors
  const T per_other;     // 1 / (M - 1)
  Buffer<T> shift, scale, offset;
  Buffer<Bits<T>> replaced;  // -1 where the exchange replaces the channel, else 0
  Buffer<Bits<T>> dead;      // -1 where furthermore no other modality borrows it: x has no part in y
  Buffer<bool> exchanging;   // a vector of channels: whether any of them is replaced

  explicit Tables(const Problem& p)
      : padded(divide_up(p.channels, kLanes<T>) * kLanes<T>),
        per_other(p.modalities > 1 ? T(1) / T(p.modalities - 1) : T(0)),
        shift(p.modalities * padded),
        scale(p.modalities * padded),
        offset(p.modalities * padded),
        replaced(p.modalities * padded),
        dead(p.modalities * padded),
        exchanging(p.modalities * padded / kLanes<T>) {}

  void set_exchange(const Problem& p, const T* weight) {
    for (int64_t c = 0; c < p.channels; ++c) {
      int64_t count = 0;
      for (int64_t m = 0; m < p.modalities; ++m) {
        const bool gone = is_replaced(p, weight[m * p.channels + c], m, c);
        replaced[m * padded + c] = gone ? -1 : 0;
        if (gone) exchanging[(m * padded + c) / kLanes<T>] = true;
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

template <class T, bool kChannelsLast, Activation kActivation>
struct Line {
  const Tables<T>& tables;
  const Problem& problem;
  int64_t channel;    // of the line, channels first; 0 channels last
  const T* x;         // these point to the line in modality 0
  const T* residual;  // may be null
  const T* dy;        // null in the forward pass

  CEN_INLINE int64_t at(int64_t m, int64_t i) const { return m * problem.modality_size() + i; }

  CEN_INLINE Vec<T> coefficient(const Buffer<T>& table, int64_t m, int64_t i) const {
    const T* row = table.get() + m * tables.padded;
    if constexpr (kChannelsLast) return load(row + i);
    return splat(row[channel]);
  }

  CEN_INLINE bool exchanging(int64_t m, int64_t i) const {
    if constexpr (kChannelsLast) return tables.exchanging[(m * tables.padded + i) / kLanes<T>];
    return tables.replaced[m * tables.padded + channel];
  }

  // yes where the mask is set, else no; channels first the mask is the same in the whole line, and set.
  CEN_INLINE Vec<T> where(const Buffer<Bits<T>>& mask, int64_t m, int64_t i, Vec<T> yes, Vec<T> no) const {
    if constexpr (!kChannelsLast) return yes;
    return load(mask.get() + m * tables.padded + i) ? yes : no;
  }

  template <class N>
  CEN_INLINE Vec<T> centred(int64_t m, int64_t i, N n) const {
    return load(x + at(m, i), n) - coefficient(tables.shift, m, i);
  }

  template <class N>
  CEN_INLINE Vec<T> z(int64_t m, int64_t i, N n) const {
    return centred(m, i, n) * coefficient(tables.scale, m, i) + coefficient(tables.offset, m, i);
  }

  // After the exchange and the residual.
  template <class N>
  CEN_INLINE Vec<T> u(int64_t m, int64_t i, N n) const {
    Vec<T> v{};
    if (exchanging(m, i)) {
      for (int64_t other = 0; other < problem.modalities; ++other)
        if (other != m) v += z(other, i, n);
      v *= tables.per_other;
      if constexpr (kChannelsLast) v = where(tables.replaced, m, i, v, z(m, i, n));
    } else {
      v = z(m, i, n);
    }
    return residual ? v + load(residual + at(m, i), n) : v;
  }

  template <class N>
  CEN_INLINE Vec<T> y(int64_t m, int64_t i, N n) const {
    const Vec<T> v = u(m, i, n);
    if constexpr (kActivation == Activation::identity) return v;
    if constexpr (kActivation == Activation::relu) return v < 0 ? Vec<T>{} : v;
    return v < 0 ? v * T(problem.negative_slope) : v;
  }

  // dy * activation'(u), the residual's gradient.
  template <class N>
  CEN_INLINE Vec<T> g(int64_t m, int64_t i, N n) const {
    const Vec<T> d = load(dy + at(m, i), n);
    if constexpr (kActivation == Activation::identity) return d;
    const Vec<T> v = u(m, i, n);
    if constexpr (kActivation == Activation::relu) return v > 0 ? d : Vec<T>{};
    return v > 0 ? d : d * T(problem.negative_slope);
  }

  // The gradient of z before the exchange: of its own place, and of those it was borrowed for.
  template <class N>
  CEN_INLINE Vec<T> dz(int64_t m, int64_t i, N n) const {
    Vec<T> d{};
    if (!exchanging(m, i)) {
      d = g(m, i, n);
    } else if constexpr (kChannelsLast) {
      d = where(tables.replaced, m, i, Vec<T>{}, g(m, i, n));
    }
    for (int64_t other = 0; other < problem.modalities; ++other)
      if (other != m && exchanging(other, i))
        d += where(tables.replaced, other, i, g(other, i, n) * tables.per_other, Vec<T>{});
    return d;
  }
};

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
