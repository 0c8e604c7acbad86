// One call of the operator as plain numbers and pointers, which is all that kernels see of it.
// The mathematics and the names are those of cen_ext/ops/norm_exchange/reference.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/activation.h"

namespace cen {

// Storage of the half types: 1+5+10 and 1+8+7 bits of sign, exponent and fraction.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of parameters, statistics and arithmetic for x of type T.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What shares statistics: the values of a channel in all samples of a modality, in one sample; those of a
// group of channels in one sample; those of all channels at one position.
enum class Norm { batch, instance, group, layer };
enum class Region { own, all };
enum class Criterion { magnitude, signed_value };  // "abs", "signed"
// The order of the rows of x: sample n of modality m is row m * N + n, or row n * M + m.
enum class Order { modality, sample };

// The tables of CPU kernels name a modality with 16 bits.
constexpr int64_t kMostModalities = 32766;

// x consists of M * groups units, each with its own statistics. Unit (m, g) has index m * groups + g in
// tables of statistics, whatever the order of the rows. Units of one group exchange channels.
struct Problem {
  Norm norm;
  int64_t modalities;  // M
  int64_t groups;      // 1 with batch norm, else N
  int64_t samples;     // per unit: N with batch norm, else 1
  int64_t joined;      // channels that share statistics: C / num_groups with group norm, else 1
  int64_t channels;    // C
  int64_t spatial;     // product of the spatial sizes
  Order order;
  bool channels_last;  // a row is [spatial, C] in memory, else [C, spatial]
  bool batch_statistics;
  bool streaming_stores;  // store results with non-temporal stores, because they are large
  double threshold;
  Region region;
  Criterion criterion;
  double eps;
  Activation activation;
  double negative_slope;
  double momentum;  // of the running statistics

  constexpr int64_t units() const { return modalities * groups; }
  constexpr int64_t unit(int64_t m, int64_t g) const { return m * groups + g; }
  constexpr int64_t values() const { return samples * spatial; }  // per channel of a unit
  // The index of a channel's mean and variance in [units, C / joined], and of a position's with layer norm,
  // in [units, spatial].
  constexpr int64_t statistic(int64_t unit, int64_t c) const {
    if (joined == 1) return unit * channels + c;
    const uint32_t together = uint32_t(joined);  // a GPU divides 32 bits with fewer registers
    return unit * (uint32_t(channels) / together) + uint32_t(c) / together;
  }
  constexpr int64_t position_statistic(int64_t unit, int64_t position) const {
    return unit * spatial + position;
  }
  // Whether a result depends on all channels that share its statistics, even on replaced ones.
  constexpr bool across_channels() const { return norm == Norm::group || norm == Norm::layer; }
  // The factor from biased to unbiased variance.
  constexpr double unbiased() const { return double(values()) / double(values() - 1); }
  constexpr int64_t row_size() const { return channels * spatial; }
  constexpr int64_t unit_size() const { return samples * row_size(); }

  // In values: from a row to that of the next sample in the same modality, and to that of the same sample in
  // the next modality.
  constexpr int64_t sample_stride() const {
    return order == Order::sample ? modalities * row_size() : row_size();
  }
  constexpr int64_t modality_stride() const {
    return order == Order::sample ? row_size() : groups * unit_size();
  }
  // The offset of the first value of unit (m, g). With several groups a unit is one sample.
  constexpr int64_t offset(int64_t m, int64_t g) const { return m * modality_stride() + g * sample_stride(); }

  // The range of channels of modality m that may be exchanged (section 3.3 of the paper).
  constexpr int64_t region_begin(int64_t m) const {
    return region == Region::own ? m * channels / modalities : 0;
  }
  constexpr int64_t region_end(int64_t m) const {
    return region == Region::own ? (m + 1) * channels / modalities : channels;
  }
};

// Tensors with the shape of x have its memory layout. weight, bias and their gradients are [M, C]; statistics
// are as in Problem::statistic().
template <class T>
struct ForwardTensors {
  const T* x;
  const Real<T>*weight, *bias;
  const Real<T>*mean, *var;  // statistics to use; null to compute those of x
  const T* residual;         // may be null
  T* y;
  Real<T>*batch_mean, *batch_var;      // statistics of x; null if mean and var are given
  Real<T>*running_mean, *running_var;  // [M, C], updated with the statistics of x; may be null
  const int32_t* route = nullptr;      // [M, C], entries as of route_of(); null to apply Eq. 6
};

template <class T>
struct BackwardTensors {
  const T *dy, *x;
  const Real<T>*weight, *bias, *mean, *var;
  const T* residual;  // may be null
  T* dx;
  Real<T>*dweight, *dbias;
  T* dresidual;                    // null without a residual
  const int32_t* route = nullptr;  // as in ForwardTensors
};

// Whether Eq. 6 of the paper replaces a channel with this scale.
template <class R>
constexpr bool is_below(const Problem& p, R scale) {
  const R threshold = static_cast<R>(p.threshold);  // PyTorch, too, compares in the precision of weight
  if (p.criterion == Criterion::signed_value) return scale <= threshold;
  return (scale < 0 ? -scale : scale) < threshold;
}

// What a channel becomes, where it is no modality: it stays, or the mean of the others replaces it.
constexpr int32_t kOwn = -2, kMean = -1;

// kOwn, kMean or the modality whose channel c replaces that of modality m. With two modalities the other is
// the mean of the others. Entries of the route that name no other modality, and are none of the two, are no
// error: those below kOwn count as it, all others as kMean. [begin, end) is the region of modality m.
template <class R>
constexpr int32_t route_of(const Problem& p, const R* weight, const int32_t* route, int64_t m, int64_t c,
                           int64_t begin, int64_t end) {
  if (p.modalities == 1) return kOwn;
  const int64_t i = m * p.channels + c;
  if (route) {
    if (route[i] <= kOwn) return kOwn;
    return p.modalities == 2 || route[i] == m || route[i] >= p.modalities ? kMean : route[i];
  }
  const bool exchanged = p.threshold != 0 && c >= begin && c < end;
  return exchanged && is_below(p, weight[i]) ? kMean : kOwn;
}
template <class R>
constexpr int32_t route_of(const Problem& p, const R* weight, const int32_t* route, int64_t m, int64_t c) {
  return route_of(p, weight, route, m, c, p.region_begin(m), p.region_end(m));
}

// Whether modality m is among those that replace a channel which becomes `route`, in another modality.
constexpr bool lends(int32_t route, int64_t m) { return route == kMean || route == m; }

// Whether channel c of modality m is replaced and lent to none: then y does not depend on it, unless by
// statistics that other channels share, and the gradients of its weight and bias are 0, even where x is NaN.
template <class R>
constexpr bool is_unread(const Problem& p, const R* weight, const int32_t* route, int64_t m, int64_t c) {
  if (route_of(p, weight, route, m, c) == kOwn) return false;
  for (int64_t other = 0; other < p.modalities; ++other)
    if (other != m && lends(route_of(p, weight, route, other, c), m)) return false;
  return true;
}

}  // namespace cen
