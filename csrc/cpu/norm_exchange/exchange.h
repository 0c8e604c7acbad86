// The operator of cen_ext/ops/norm_exchange/reference.py on single vectors of x.
//
// A strip is a set of vectors, at the same offsets in every modality, that share their channels: the values
// of one channel (channels first; all elements of a vector have the same channel), or one vector of channels
// at all pixels (channels last). Coefficients stay in registers throughout a strip; one code serves both
// layouts.
#pragma once

#include "../vec.h"

namespace cen::cpu {
namespace {

// Weight, bias and statistics folded into coefficients, for a vector of channels of one unit.
//   z = (x - shift) * scale + offset
// shift is the mean rounded to R and offset compensates the rounding, so that z stays accurate where the mean
// is large against the standard deviation. No larger than needed, because the L1 cache should hold those of
// all channels.
template <class R>
struct alignas(64) Coefficients {
  static constexpr int64_t kCount = kVecSize<R>;
  R shift[kCount], scale[kCount], offset[kCount];
  // 0 where the channel stays; where the exchange replaces it, -1 for the mean of the other modalities or
  // k + 1 for modality k.
  int16_t replaced[kCount];
  uint16_t dead;           // bits, set where replaced and borrowed by no modality: y does not depend on x
  bool exchanged[kCount];  // whether any modality's channel is replaced
  bool any_exchanged;
  bool any_replaced;  // of this modality

  CEN_INLINE bool is_dead(int64_t element) const { return dead >> element & 1; }
  void set_affine(int64_t element, double mean, double var, double eps, R weight, R bias) {
    if (is_dead(element)) return;  // the coefficients stay zero, whatever the statistics
    const double a = weight / std::sqrt(var + eps);
    shift[element] = static_cast<R>(mean);
    scale[element] = static_cast<R>(a);
    offset[element] = static_cast<R>(bias - (mean - shift[element]) * a);
  }
};

// Further ones of backward through batch statistics, once the sums are known:
//   dx = dz * scale + (x - shift) * on_x + constant
template <class R>
struct alignas(64) Slopes {
  R on_x[kVecSize<R>], constant[kVecSize<R>];
};

// The coefficients of all channels of all units.
template <class R>
class Tables {
 public:
  const int64_t strips;  // vectors of channels per unit
  const bool routed;     // whether a single modality, not the mean of the others, may replace a channel

  Tables(const Problem& p, const R* weight, const int32_t* route, bool has_slopes = false)
      : strips(divide_up(p.channels, kVecSize<R>)),
        routed(p.modalities > 2 && route),
        groups_(p.groups),
        table_(p.units() * strips),
        slopes_(has_slopes ? p.units() * strips : 0) {
    std::memset(static_cast<void*>(table_.get()), 0, p.units() * strips * sizeof(Coefficients<R>));
    if (has_slopes) std::memset(static_cast<void*>(slopes_.get()), 0, p.units() * strips * sizeof(Slopes<R>));
    if (p.modalities == 1 || (p.threshold == 0 && !route)) return;
    const auto each = [&](auto f) {
      for (int64_t m = 0; m < p.modalities; ++m) {
        const int64_t end = route ? p.channels : p.region_end(m);
        for (int64_t c = route ? 0 : p.region_begin(m); c < end; ++c) f(m, c);
      }
    };
    each([&](int64_t m, int64_t c) {
      const int32_t source = route_of(p, weight, route, m, c);
      if (source != kOwn) replace(p, m, c, source);
    });
    if (p.across_channels()) return;  // statistics depend on x even where y does not
    each([&](int64_t m, int64_t c) {
      if (is_unread(p, weight, route, m, c)) kill(p, m, c);
    });
  }

  // The coefficients of all strips of a unit.
  CEN_INLINE Coefficients<R>* unit(int64_t unit) const { return table_.get() + unit * strips; }
  // The coefficients that hold channel c, as element c % kVecSize<R>.
  CEN_INLINE Coefficients<R>& at(int64_t unit, int64_t c) const {
    return table_[unit * strips + c / kVecSize<R>];
  }
  CEN_INLINE Slopes<R>* slopes(int64_t unit) const { return slopes_.get() + unit * strips; }
  // Whether any channel of any modality is replaced.
  bool any_exchanged() const {
    bool any = false;
    for (int64_t strip = 0; strip < strips; ++strip) any |= table_[strip].any_exchanged;
    return any;
  }

 private:
  void replace(const Problem& p, int64_t m, int64_t c, int32_t source) {
    const int64_t element = c % kVecSize<R>;
    for (int64_t g = 0; g < groups_; ++g) {
      Coefficients<R>& own = at(p.unit(m, g), c);
      own.replaced[element] = static_cast<int16_t>(source == kMean ? -1 : source + 1);
      own.any_replaced = true;
      for (int64_t other = 0; other < p.modalities; ++other) {
        Coefficients<R>& k = at(p.unit(other, g), c);
        k.exchanged[element] = k.any_exchanged = true;
      }
    }
  }

  void kill(const Problem& p, int64_t m, int64_t c) {
    for (int64_t g = 0; g < groups_; ++g) at(p.unit(m, g), c).dead |= 1 << c % kVecSize<R>;
  }

  const int64_t groups_;
  const Buffer<Coefficients<R>> table_;
  const Buffer<Slopes<R>> slopes_;
};

// How a strip takes part in the exchange:
//   none     no modality replaces any of its channels
//   pair     M = 2, with the coefficients of both modalities in registers
//   general  any M, where the mean of the others replaces a channel
//   routed   any M, where one of the others may do so alone; that each channel of a vector may have another
//            one costs M = 3 in channels last 15 to 19 percent
enum class Exchange { none, pair, general, routed };

// The tensors that the kernels read, which share a layout, and the strides between the units of a group.
template <class T>
struct GroupInputs {
  const T *x, *residual, *dy;  // residual and dy may be null
  int64_t modalities;
  int64_t stride;      // between modalities, in values
  int64_t row_stride;  // between modalities, in Coefficients
  Real<T> per_other;   // 1 / (M - 1)
  bool routed;         // whether one modality, not the mean of the others, may replace a channel
  ActivationParameters<Real<T>> activation;

  GroupInputs(const Problem& p, const Tables<Real<T>>& tables, const T* x, const T* residual, const T* dy)
      : x(x),
        residual(residual),
        dy(dy),
        modalities(p.modalities),
        stride(p.modality_stride()),
        row_stride(p.groups * tables.strips),
        per_other(p.modalities > 1 ? Real<T>(1) / Real<T>(p.modalities - 1) : Real<T>(0)),
        routed(tables.routed),
        activation(p.activation, p.negative_slope) {}
};

// Coefficients::replaced of a vector's channels. GCC 12 makes several instructions of
// __builtin_convertvector where there is one.
template <class R>
CEN_INLINE Vec<Bits<R>> load_sources(const int16_t* from) {
  using Sources = typename VecOf<int16_t, kVecSize<R> * sizeof(int16_t)>::type;
  const Sources sources = load_unaligned<Sources>(from);
#if CEN_VECTOR_BYTES == 64
  if constexpr (sizeof(R) == 4) return (Vec<Bits<R>>)_mm512_maskz_cvtepi16_epi32(0xffff, (__m256i)sources);
#elif CEN_VECTOR_BYTES == 32
  if constexpr (sizeof(R) == 4) return (Vec<Bits<R>>)_mm256_cvtepi16_epi32((__m128i)sources);
#endif
  return __builtin_convertvector(sources, Vec<Bits<R>>);
}

// A mask of the elements whose bits are set.
template <class R>
CEN_INLINE Vec<Bits<R>> bits_of(uint16_t bits) {
  static constexpr Bits<R> kBit[16] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                       1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return (splat(static_cast<Bits<R>>(bits)) & load_row(kBit)) != 0;
}

// The coefficients of one unit's strip, in registers.
template <class R, bool kChannelsLast>
struct UnitCoefficients {
  using Mask = std::conditional_t<kChannelsLast, Vec<Bits<R>>, bool>;

  Vec<R> shift, scale, offset;
  Mask replaced;

  CEN_INLINE UnitCoefficients(const Coefficients<R>* k, int64_t element)
      : shift(coefficient(k->shift, element)),
        scale(coefficient(k->scale, element)),
        offset(coefficient(k->offset, element)),
        replaced(replaced_in(k, element)) {}

  static CEN_INLINE Vec<R> coefficient(const R* row, int64_t element) {
    if constexpr (kChannelsLast)
      return load_row(row);
    else
      return splat(row[element]);
  }
  static CEN_INLINE Mask replaced_in(const Coefficients<R>* k, int64_t element) {
    if constexpr (kChannelsLast)
      return load_sources<R>(k->replaced);
    else
      return k->replaced[element] != 0;
  }
  static CEN_INLINE Mask dead_in(const Coefficients<R>* k, int64_t element) {
    if constexpr (kChannelsLast)
      return bits_of<R>(k->dead);
    else
      return k->is_dead(element);
  }
  // Whether the exchange replaces any channel of the strip in the modality of k.
  static CEN_INLINE bool any_replaced(const Coefficients<R>* k, int64_t element) {
    return kChannelsLast ? k->any_replaced : k->replaced[element] != 0;
  }

  CEN_INLINE Vec<R> z(Vec<R> x) const { return (x - shift) * scale + offset; }
};

// What replaces the channels of a vector in one modality, where something does.
template <class R, bool kChannelsLast>
struct ChannelSource {
  using Value = std::conditional_t<kChannelsLast, Vec<Bits<R>>, Bits<R>>;
  using Mask = typename UnitCoefficients<R, kChannelsLast>::Mask;

  Value value;  // as Coefficients::replaced

  CEN_INLINE ChannelSource(const int16_t* replaced, int64_t element) {
    if constexpr (kChannelsLast)
      value = load_sources<R>(replaced);
    else
      value = replaced[element];
  }

  CEN_INLINE Mask is_mean() const { return value == -1; }
  // Whether the channel is replaced by modality m, alone or with others.
  CEN_INLINE Mask lends(int64_t m) const { return is_mean() | (value == static_cast<Bits<R>>(m + 1)); }
};

// Forward and backward values of modality m along a strip. `at` is the offset of a vector in the tensors, n
// the number of its elements.
template <class T, bool kChannelsLast, Exchange kExchange, ActivationForm kForm>
class Strip {
  using R = Real<T>;
  using V = Vec<R>;
  using Own = UnitCoefficients<R, kChannelsLast>;
  using Source = ChannelSource<R, kChannelsLast>;
  using Mask = typename Own::Mask;

 public:
  // own: the coefficients of the strip in modality m; element: that of the channel, for channels first.
  CEN_INLINE Strip(const GroupInputs<T>& group, const Coefficients<R>* own, int64_t element, int64_t m)
      : group_(group),
        coefficients_(own),
        element_(element),
        m_(m),
        to_next_(kExchange == Exchange::pair ? 1 - 2 * m : 0),
        own_(own, element),
        next_(own + to_next_ * group.row_stride, element),
        borrows_(Own::any_replaced(own, element)),
        next_borrows_(Own::any_replaced(own + to_next_ * group.row_stride, element)),
        dead_(Own::dead_in(own, element)),
        activate_(group.activation) {}

  CEN_INLINE V scale() const { return own_.scale; }

  CEN_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(group_.x + at);
    if (group_.dy) __builtin_prefetch(group_.dy + at);
    if constexpr (kExchange == Exchange::pair)
      __builtin_prefetch((group_.dy ? group_.dy : group_.x) + at + to_next_ * group_.stride);
  }

  // x - shift, and 0 where y does not depend on x.
  template <class N>
  CEN_INLINE V centered(int64_t at, N n) const {
    const V d = load(group_.x + at, n) - own_.shift;
    if constexpr (kExchange == Exchange::none) return d;
    return dead_ ? V{} : d;
  }

  template <class N>
  CEN_INLINE V y(int64_t at, N n) const {
    return activate_.value(u(at, n));
  }

  // dy * activation'(u), which is the gradient of the residual.
  template <class N>
  CEN_INLINE V g(int64_t at, N n) const {
    return g(at, n, [&] { return u(at, n); });
  }

  // The gradient of z before the exchange: g of its own modality and of those that borrow z.
  template <class N>
  CEN_INLINE V dz(V own_g, int64_t at, N n) const {
    if constexpr (kExchange == Exchange::none) return own_g;
    const V d = own_.replaced ? V{} : own_g;
    if constexpr (kExchange == Exchange::pair) {
      if (!next_borrows_) return d + V{};  // as if it added nothing: -0 becomes +0
      return d + of_borrower(next_.replaced, at + to_next_ * group_.stride, n,
                             [&] { return own_.z(load(group_.x + at, n)); });
    }
    V shared{}, lent{};  // of those that take the mean of the others, and of those that take this modality
    for_others(m_, [&](int64_t other) CEN_INLINE_LAMBDA {
      if (!Own::any_replaced(row(other), element_)) return;
      const auto z = [&] { return borrowed(other, at, n); };
      if constexpr (kExchange == Exchange::general) {
        shared += of_borrower(Own::replaced_in(row(other), element_), offset_in(at, other), n, z);
      } else {
        const Source source(row(other)->replaced, element_);
        const V of_other = of_borrower(source.lends(m_), offset_in(at, other), n, z);
        shared += source.is_mean() ? of_other : V{};
        lent += source.is_mean() ? V{} : of_other;
      }
    });
    return kExchange == Exchange::general ? d + shared * group_.per_other
                                          : d + (lent + shared * group_.per_other);
  }

 private:
  CEN_INLINE const Coefficients<R>* row(int64_t m) const {
    return coefficients_ + (m - m_) * group_.row_stride;
  }
  CEN_INLINE int64_t offset_in(int64_t at, int64_t m) const { return at + (m - m_) * group_.stride; }

  // What replaces z of modality m: the mean over all others, or z of one of them.
  template <class N>
  CEN_INLINE V borrowed(int64_t m, int64_t at, N n) const {
    const auto z = [&](int64_t other) CEN_INLINE_LAMBDA {
      return Own(row(other), element_).z(load(group_.x + offset_in(at, other), n));
    };
    V sum{};
    if constexpr (kExchange == Exchange::general) {
      for_others(m, [&](int64_t other) CEN_INLINE_LAMBDA { sum += z(other); });
      return sum * group_.per_other;
    } else {
      const Source source(row(m)->replaced, element_);
      for_others(m, [&](int64_t other) CEN_INLINE_LAMBDA { sum += source.lends(other) ? z(other) : V{}; });
      return source.is_mean() ? sum * group_.per_other : sum;
    }
  }

  // Calls f for all modalities but m.
  template <class F>
  CEN_INLINE void for_others(int64_t m, F f) const {
    for (int64_t other = 0; other < group_.modalities; ++other)
      if (other != m) f(other);
  }

  template <class N>
  CEN_INLINE V plus_residual(V v, int64_t at, N n) const {
    return group_.residual ? v + load(group_.residual + at, n) : v;
  }

  // The argument of the activation: z after the exchange, plus the residual.
  template <class N>
  CEN_INLINE V u(int64_t at, N n) const {
    const auto z = [&] { return own_.z(load(group_.x + at, n)); };
    V v;
    if (kExchange == Exchange::none || !borrows_)
      v = z();
    else if constexpr (kExchange == Exchange::pair)
      v = own_.replaced ? next_.z(load(group_.x + at + to_next_ * group_.stride, n)) : z();
    else
      v = own_.replaced ? borrowed(m_, at, n) : z();
    return plus_residual(v, at, n);
  }

  template <class N, class U>
  CEN_INLINE V g(int64_t at, N n, U u) const {
    return activate_.gradient(load(group_.dy + at, n), u);
  }

  // g of another modality, at its offset `at`, where the exchange replaces its z by z(); else 0.
  template <class N, class Z>
  CEN_INLINE V of_borrower(Mask replaced, int64_t at, N n, Z z) const {
    const auto all = [&] { return g(at, n, [&] { return plus_residual(z(), at, n); }); };
    return replaced ? all() : V{};
  }

  const GroupInputs<T>& group_;
  const Coefficients<R>* const coefficients_;
  const int64_t element_, m_, to_next_;
  const Own own_, next_;
  const bool borrows_, next_borrows_;
  const Mask dead_;
  const Activate<V, kForm> activate_;
};

// Calls f with the Exchange of a strip as a compile-time constant.
template <class F>
CEN_INLINE void with_exchange(int64_t modalities, bool routed, bool any_exchanged, F f) {
  if (!any_exchanged)
    f(std::integral_constant<Exchange, Exchange::none>{});
  else if (modalities == 2)
    f(std::integral_constant<Exchange, Exchange::pair>{});
  else if (routed)
    f(std::integral_constant<Exchange, Exchange::routed>{});
  else
    f(std::integral_constant<Exchange, Exchange::general>{});
}

// Whether the kernels for T have every form of activations. Where speed matters little, one serves all.
#ifdef CEN_ONE_FORM
template <class T>
constexpr bool kHasForms = false;
#else
template <class T>
constexpr bool kHasForms = !std::is_same_v<T, double>;
#endif

// Calls f with the form of an activation as a compile-time constant; without kLeaky, relu has the one of any.
template <class T, bool kLeaky, class F>
CEN_INLINE void with_form(Activation activation, F f) {
  if constexpr (kHasForms<T>) {
    constexpr ActivationForm kRelu = kLeaky ? ActivationForm::leaky : ActivationForm::any;
    if (activation == Activation::identity)
      return f(std::integral_constant<ActivationForm, ActivationForm::identity>{});
    if (activation == Activation::relu || activation == Activation::leaky_relu)
      return f(std::integral_constant<ActivationForm, kRelu>{});
  }
  f(std::integral_constant<ActivationForm, ActivationForm::any>{});
}

}  // namespace
}  // namespace cen::cpu
