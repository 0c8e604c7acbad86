// The operator on vectors of values: cen_ext/reference.py, one vector of x at a time.
//
// A strip is a set of vectors, at the same places in every modality, that share their channels: the values of
// one channel (channels first; every lane has the same channel), or one vector of channels down the pixels
// (channels last). Coefficients stay in registers throughout a strip, and the code is the same for both.
#pragma once

#include "vec.h"

namespace cen::cpu {
namespace {

// What the kernels need of weight, bias and statistics: z = (x - shift) * scale + offset, a row a unit.
// shift is the mean rounded to R and offset makes up for the rounding, so that z keeps its accuracy where
// the mean is large against the deviation. The masks have a row a modality.
template <class R>
struct Tables {
  const int64_t padded;  // channels a row, at least one vector
  const int64_t strips;  // vectors a row
  Buffer<R> shift, scale, offset;
  Buffer<Bits<R>> replaced;  // -1 where the exchange replaces the channel, else 0
  Buffer<Bits<R>> dead;      // -1 where furthermore no other modality borrows it: x has no part in y
  Buffer<bool> exchanged;    // a channel: whether any modality's is replaced

  Tables(const Problem& p, const R* weight)
      : padded(larger(p.channels, kLanes<R>)),
        strips(divide_up(p.channels, kLanes<R>)),
        shift(p.units() * padded),
        scale(p.units() * padded),
        offset(p.units() * padded),
        replaced(p.modalities * padded),
        dead(p.modalities * padded),
        exchanged(padded) {
    std::memset(replaced.get(), 0, p.modalities * padded * sizeof(Bits<R>));
    std::memset(dead.get(), 0, p.modalities * padded * sizeof(Bits<R>));
    std::memset(exchanged.get(), 0, padded * sizeof(bool));
    if (p.modalities == 1 || p.threshold == 0) return;
    for (int64_t m = 0; m < p.modalities; ++m)
      for (int64_t c = p.region_begin(m); c < p.region_end(m); ++c) {
        if (!is_below(p, weight[m * p.channels + c])) continue;
        // Dead as long as it is the only one of the channel.
        for (int64_t other = 0; other < m && exchanged[c]; ++other) dead[other * padded + c] = 0;
        replaced[m * padded + c] = -1;
        dead[m * padded + c] = exchanged[c] ? 0 : -1;
        exchanged[c] = true;
      }
  }

  void set_affine(int64_t unit, int64_t c, double mean, double var, double eps, R weight, R bias) {
    const int64_t i = unit * padded + c;
    const double a = weight / std::sqrt(var + eps);
    shift[i] = static_cast<R>(mean);
    scale[i] = static_cast<R>(a);
    offset[i] = static_cast<R>(bias - (mean - shift[i]) * a);
  }

  // Whether any modality is replaced in a vector of channels.
  CEN_INLINE bool any_exchanged(int64_t channel) const {
    uint64_t any[2] = {};
    std::memcpy(any, exchanged.get() + channel, kLanes<R> * sizeof(bool));
    return any[0] | any[1];
  }
};

// How a strip takes part in the exchange: not at all, with none of its channels replaced in any modality; with
// M = 2, where the other modality's coefficients stay in registers too; with any M.
enum class Exchange { none, pair, general };

// One unit: where its values begin, and its rows of the tables.
template <class T>
struct Branch {
  const T *x, *residual, *dy;  // the last two may be null
  const Real<T>*shift, *scale, *offset;
  const Bits<Real<T>>*replaced, *dead;
};

// The units of one group, which exchange channels.
template <class T>
class Group {
  using R = Real<T>;

 public:
  const int64_t modalities;
  const R per_other;      // 1 / (M - 1)
  const R slope;          // where the activation's argument is negative: its value times slope,
  const Bits<R> kept;     // of which these bits are kept; none with relu

  // residual and dy may be null.
  Group(const Problem& p, const Tables<R>& tables, const T* x, const T* residual, const T* dy, int64_t g)
      : modalities(p.modalities),
        per_other(p.modalities > 1 ? R(1) / R(p.modalities - 1) : R(0)),
        slope(p.activation == Activation::identity ? 1 : static_cast<R>(p.negative_slope)),
        kept(p.activation == Activation::relu ? 0 : -1),
        tables_(tables),
        x_(x + g * p.unit_size()),
        residual_(residual ? residual + g * p.unit_size() : nullptr),
        dy_(dy ? dy + g * p.unit_size() : nullptr),
        stride_(p.groups * p.unit_size()),
        groups_(p.groups),
        g_(g) {}

  CEN_INLINE Branch<T> branch(int64_t m) const {
    const int64_t row = (m * groups_ + g_) * tables_.padded, mask = m * tables_.padded;
    return {x_ + m * stride_,
            residual_ ? residual_ + m * stride_ : nullptr,
            dy_ ? dy_ + m * stride_ : nullptr,
            tables_.shift.get() + row,
            tables_.scale.get() + row,
            tables_.offset.get() + row,
            tables_.replaced.get() + mask,
            tables_.dead.get() + mask};
  }
  // With whom modality m exchanges where M = 2.
  CEN_INLINE Branch<T> partner(int64_t m) const { return branch(modalities == 2 ? 1 - m : m); }

 private:
  const Tables<R>& tables_;
  const T *x_, *residual_, *dy_;
  const int64_t stride_, groups_, g_;
};

// One unit along a strip.
template <class T, bool kChannelsLast>
struct Side {
  using R = Real<T>;
  using Mask = std::conditional_t<kChannelsLast, Vec<Bits<R>>, bool>;

  const T *x, *residual, *dy;  // of the branch
  Vec<R> shift, scale, offset;
  Mask replaced;

  CEN_INLINE Side(const Branch<T>& b, int64_t channel)
      : x(b.x),
        residual(b.residual),
        dy(b.dy),
        shift(coefficient(b.shift + channel)),
        scale(coefficient(b.scale + channel)),
        offset(coefficient(b.offset + channel)),
        replaced(mask(b.replaced + channel)) {}

  static CEN_INLINE Vec<R> coefficient(const R* at) {
    if constexpr (kChannelsLast)
      return load_row(at);
    else
      return splat(*at);
  }
  static CEN_INLINE Mask mask(const Bits<R>* at) {
    if constexpr (kChannelsLast)
      return load_row(at);
    else
      return *at != 0;
  }

  template <class N>
  CEN_INLINE Vec<R> centred(int64_t at, N n) const {
    return load(x + at, n) - shift;
  }
  template <class N>
  CEN_INLINE Vec<R> z(int64_t at, N n) const {
    return centred(at, n) * scale + offset;
  }
  template <class N>
  CEN_INLINE Vec<R> plus_residual(Vec<R> v, int64_t at, N n) const {
    return residual ? v + load(residual + at, n) : v;
  }
};

// A strip, seen from modality m. `at` counts from the beginning of a unit.
template <class T, bool kChannelsLast, Exchange kExchange>
class Strip {
  using R = Real<T>;
  using Lanes = Vec<R>;
  using Own = Side<T, kChannelsLast>;
  using Mask = typename Own::Mask;

 public:
  CEN_INLINE Strip(const Group<T>& group, const Branch<T>& own, const Branch<T>& partner, int64_t m,
                   int64_t channel)
      : group_(group),
        channel_(channel),
        m_(m),
        own_(own, channel),
        next_(kExchange == Exchange::pair ? partner : own, channel),
        dead_(Own::mask(own.dead + channel)),
        slope_(splat(group.slope)),
        kept_(splat(group.kept)) {}

  CEN_INLINE Lanes scale() const { return own_.scale; }

  CEN_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(own_.x + at);
    if (own_.dy) __builtin_prefetch(own_.dy + at);
    if (own_.residual) __builtin_prefetch(own_.residual + at);
  }

  // x - shift, and 0 where x has no part in y.
  template <class N>
  CEN_INLINE Lanes centred(int64_t at, N n) const {
    const Lanes d = own_.centred(at, n);
    if constexpr (kExchange == Exchange::none) return d;
    return dead_ ? Lanes{} : d;
  }

  template <class N>
  CEN_INLINE Lanes y(int64_t at, N n) const {
    const Lanes v = u(at, n);
    return v < 0 ? keep(v * slope_) : v;  // +0 with relu, even where v is infinite
  }

  // dy * activation'(u), the residual's gradient.
  template <bool kActivation, class N>
  CEN_INLINE Lanes g(int64_t at, N n) const {
    return g<kActivation>(own_, at, n, [&] { return u(at, n); });
  }

  // The gradient of z before the exchange: g of its own place, and of those that borrow it.
  template <bool kActivation, class N>
  CEN_INLINE Lanes dz(Lanes own_g, int64_t at, N n) const {
    if constexpr (kExchange == Exchange::none) return own_g;
    const Lanes d = own_.replaced ? Lanes{} : own_g;
    if constexpr (kExchange == Exchange::pair)
      return d + of_borrower<kActivation>(next_, at, n, [&] { return own_.z(at, n); });
    Lanes sum{};
    for (int64_t other = 0; other < group_.modalities; ++other)
      if (other != m_)
        sum += of_borrower<kActivation>(side(other), at, n, [&] { return mean_without(other, at, n); });
    return d + sum * group_.per_other;
  }

 private:
  CEN_INLINE Own side(int64_t m) const { return Own(group_.branch(m), channel_); }

  // The mean of the z of all modalities but m.
  template <class N>
  CEN_INLINE Lanes mean_without(int64_t m, int64_t at, N n) const {
    Lanes sum{};
    for (int64_t other = 0; other < group_.modalities; ++other)
      if (other != m) sum += side(other).z(at, n);
    return sum * group_.per_other;
  }

  // After the exchange and the residual.
  template <class N>
  CEN_INLINE Lanes u(int64_t at, N n) const {
    Lanes v;
    if constexpr (kExchange == Exchange::none)
      v = own_.z(at, n);
    else if constexpr (kExchange == Exchange::pair)
      v = own_.replaced ? next_.z(at, n) : own_.z(at, n);
    else
      v = own_.replaced ? mean_without(m_, at, n) : own_.z(at, n);
    return own_.plus_residual(v, at, n);
  }

  template <bool kActivation, class N, class U>
  CEN_INLINE Lanes g(const Own& s, int64_t at, N n, U u) const {
    const Lanes d = load(s.dy + at, n);
    if constexpr (!kActivation) return d;
    return u() > 0 ? d : keep(d * slope_);
  }

  // g where modality s is replaced, by what z() gives; else 0.
  template <bool kActivation, class N, class Z>
  CEN_INLINE Lanes of_borrower(const Own& s, int64_t at, N n, Z z) const {
    const auto all = [&] { return g<kActivation>(s, at, n, [&] { return s.plus_residual(z(), at, n); }); };
    return s.replaced ? all() : Lanes{};
  }

  CEN_INLINE Lanes keep(Lanes v) const { return (Lanes)((Vec<Bits<R>>)v & kept_); }

  const Group<T>& group_;
  const int64_t channel_, m_;
  const Own own_, next_;
  const Mask dead_;
  const Lanes slope_;
  const Vec<Bits<R>> kept_;
};

// f(exchange) with how a strip takes part as a compile-time constant.
template <class F>
CEN_INLINE void with_exchange(int64_t modalities, bool any_exchanged, F f) {
  if (!any_exchanged)
    f(std::integral_constant<Exchange, Exchange::none>{});
  else if (modalities == 2)
    f(std::integral_constant<Exchange, Exchange::pair>{});
  else
    f(std::integral_constant<Exchange, Exchange::general>{});
}

// f(constant) with a condition as a compile-time constant.
template <class F>
CEN_INLINE void with_constant(bool condition, F f) {
  if (condition)
    f(std::true_type{});
  else
    f(std::false_type{});
}

}  // namespace
}  // namespace cen::cpu
