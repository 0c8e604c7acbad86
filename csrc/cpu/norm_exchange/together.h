// The operator on the vectors that all modalities have at one place, each of which is read once.
#pragma once

#include "exchange.h"

namespace cen::cpu {
namespace {

// The number of modalities that exchange with each other, or 0 where it is no compile-time constant. Without
// an exchange, each modality is by itself.
constexpr int64_t participants(Exchange exchange) {
  return exchange == Exchange::none ? 1 : exchange == Exchange::pair ? 2 : 0;
}

// Calls f(m) for `count` participants. Where their number kCount is a constant so is m, which keeps arrays of
// them in registers.
template <int64_t kCount, class F>
CEN_INLINE void each_participant(int64_t count, F f) {
  if constexpr (kCount == 0) {
    for (int64_t m = 0; m < count; ++m) f(m);
  } else {
    f(std::integral_constant<int64_t, 0>{});
    if constexpr (kCount == 2) f(std::integral_constant<int64_t, 1>{});
  }
}

// One value per participant: in registers, or in scratch memory where their number is no constant.
template <class X, int64_t kCount>
struct PerModality {
  X values[kCount];

  CEN_INLINE explicit PerModality(X*) {}
  CEN_INLINE X& operator[](int64_t m) { return values[m]; }
  CEN_INLINE const X& operator[](int64_t m) const { return values[m]; }
};
template <class X>
struct PerModality<X, 0> {
  X* const values;

  CEN_INLINE explicit PerModality(X* scratch) : values(scratch) {}
  CEN_INLINE X& operator[](int64_t m) const { return values[m]; }
};

// Scratch memory of a thread for PerModality.
template <class R>
class Scratch {
 public:
  explicit Scratch(int64_t modalities) : modalities_(modalities), values_(3 * modalities) {}
  CEN_INLINE Vec<R>* row(int64_t i) const { return values_.get() + i * modalities_; }

 private:
  const int64_t modalities_;
  const Buffer<Vec<R>> values_;
};

// The values of all modalities at one place, of which each tensor is read once. `at` is the offset of the
// first modality's vector in the tensors and n the number of its elements. channels.z(m, x) returns what x of
// modality m is normalized to, and channels.replaced(m) what its Coefficients have by that name: a vector or,
// where all elements of a vector are of one channel, a number.
template <class T, Exchange kExchange, ActivationForm kForm>
class Together {
  using R = Real<T>;
  using V = Vec<R>;
  static constexpr int64_t kCount = participants(kExchange);
  using Values = PerModality<V, kCount>;

 public:
  CEN_INLINE Together(const GroupInputs<T>& group, const Scratch<R>& scratch)
      : group_(group), scratch_(scratch), activate_(group.activation) {}

  CEN_INLINE int64_t count() const { return kCount ? kCount : group_.modalities; }

  // Calls put(m, offset, y) for every modality.
  template <class N, class Channels, class Put>
  CEN_INLINE void forward(int64_t at, N n, const Channels& channels, Put put) const {
    Values z(scratch_.row(0));
    each(at,
         [&](int64_t m, int64_t own) CEN_INLINE_LAMBDA { z[m] = channels.z(m, load(group_.x + own, n)); });
    each(at, [&](int64_t m, int64_t own) CEN_INLINE_LAMBDA {
      put(m, own, activate_.value(plus_residual(exchanged(z, channels, m), own, n)));
    });
  }

  // Calls put(m, offset, g, dz, x) for every modality: g = dy * activation'(u) is the gradient of the
  // residual, and dz that of z before the exchange, from g of its own modality and of those that borrow z.
  template <class N, class Channels, class Put>
  CEN_INLINE void backward(int64_t at, N n, const Channels& channels, Put put) const {
    Values x(scratch_.row(0)), z(scratch_.row(1)), g(scratch_.row(2));
    each(at, [&](int64_t m, int64_t own) CEN_INLINE_LAMBDA {
      x[m] = load(group_.x + own, n);
      if constexpr (kForm != ActivationForm::identity) z[m] = channels.z(m, x[m]);
    });
    each(at, [&](int64_t m, int64_t own) CEN_INLINE_LAMBDA {
      g[m] = activate_.gradient(load(group_.dy + own, n), [&]() CEN_INLINE_LAMBDA {
        return plus_residual(exchanged(z, channels, m), own, n);
      });
    });
    each(at, [&](int64_t m, int64_t own)
                 CEN_INLINE_LAMBDA { put(m, own, g[m], returned(g, channels, m), x[m]); });
  }

 private:
  template <class F>
  CEN_INLINE void each(int64_t at, F f) const {
    each_participant<kCount>(count(), [&](int64_t m) CEN_INLINE_LAMBDA { f(m, at + m * group_.stride); });
  }
  template <class F>
  CEN_INLINE void for_others(int64_t m, F f) const {
    for (int64_t other = 0; other < count(); ++other)
      if (other != m) f(other);
  }

  template <class N>
  CEN_INLINE V plus_residual(V v, int64_t at, N n) const {
    return group_.residual ? v + load(group_.residual + at, n) : v;
  }

  // Whether modality m is among those that replace a channel.
  template <class Source>
  static CEN_INLINE auto lends(Source source, int64_t m) {
    return (source == -1) | (source == static_cast<Bits<R>>(m + 1));
  }

  // z of modality m after the exchange.
  template <class Channels>
  CEN_INLINE V exchanged(const Values& z, const Channels& channels, int64_t m) const {
    if constexpr (kExchange == Exchange::none) {
      return z[m];
    } else if constexpr (kExchange == Exchange::pair) {
      return channels.replaced(m) != 0 ? z[1 - m] : z[m];
    } else {
      const auto source = channels.replaced(m);
      V sum{};
      for_others(m, [&](int64_t other) CEN_INLINE_LAMBDA {
        if constexpr (kExchange == Exchange::general)
          sum += z[other];
        else
          sum += lends(source, other) ? z[other] : V{};
      });
      const V mean = sum * group_.per_other;
      if constexpr (kExchange == Exchange::general) return source != 0 ? mean : z[m];
      const V borrowed = source == -1 ? mean : sum;
      return source != 0 ? borrowed : z[m];
    }
  }

  // The gradient of z of modality m before the exchange.
  template <class Channels>
  CEN_INLINE V returned(const Values& g, const Channels& channels, int64_t m) const {
    if constexpr (kExchange == Exchange::none) {
      return g[m];
    } else {
      const V own = channels.replaced(m) != 0 ? V{} : g[m];
      if constexpr (kExchange == Exchange::pair)
        return own + (channels.replaced(1 - m) != 0 ? g[1 - m] : V{});
      V shared{}, lent{};  // of those that take the mean of the others, and of those that take this modality
      for_others(m, [&](int64_t other) CEN_INLINE_LAMBDA {
        const auto source = channels.replaced(other);
        if constexpr (kExchange == Exchange::general) {
          shared += source != 0 ? g[other] : V{};
        } else {
          const V of_other = lends(source, m) ? g[other] : V{};
          shared += source == -1 ? of_other : V{};
          lent += source == -1 ? V{} : of_other;
        }
      });
      if constexpr (kExchange == Exchange::general) return own + shared * group_.per_other;
      return own + (lent + shared * group_.per_other);
    }
  }

  const GroupInputs<T>& group_;
  const Scratch<R>& scratch_;
  const Activate<V, kForm> activate_;
};

// Calls f(exchange, m) for the participants in the exchange of a strip, m being the first of them: once for
// all modalities or, without an exchange, for each. `first` are the coefficients of modality 0, and kExchange
// is that of the call. Two modalities go the same way through all strips: it costs less than a branch.
template <Exchange kExchange, class T, class F>
CEN_INLINE void for_participants(const GroupInputs<T>& group, const Coefficients<Real<T>>* first, F f) {
  const bool together = kExchange == Exchange::pair || (kExchange != Exchange::none && first->any_exchanged);
  if (together) return f(std::integral_constant<Exchange, kExchange>{}, int64_t{0});
  if constexpr (kExchange != Exchange::pair)
    for (int64_t m = 0; m < group.modalities; ++m) f(std::integral_constant<Exchange, Exchange::none>{}, m);
}

}  // namespace
}  // namespace cen::cpu
