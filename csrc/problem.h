// What a call of the operator is about, in plain numbers and pointers: all that a kernel knows of it.
// The mathematics is defined in cen_ext/ops/norm_exchange/reference.py; names are those used there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/activation.h"

namespace cen {

// Half types as they lie in memory: 1+5+10 and 1+8+7 bits of sign, exponent, fraction.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of parameters, statistics and computations where x is of type T.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Region { own, all };
enum class Criterion { magnitude, signed_value };  // "abs", "signed"

// x is cut into units, M * groups of them, each with statistics of its own. Unit (m, g) is number
// m * groups + g, both in memory and in tables of statistics. Units of one group exchange channels.
struct Problem {
  int64_t modalities;  // M
  int64_t groups;      // 1 with batch norm, N with instance norm
  int64_t samples;     // of a unit: N with batch norm, 1 with instance norm
  int64_t channels;    // C
  int64_t spatial;     // product of the spatial sizes
  bool channels_last;  // a unit is [samples, spatial, C] in memory, else [samples, C, spatial]
  bool batch_statistics;
  bool streaming_stores;  // results are large: store them past the caches
  double threshold;
  Region region;
  Criterion criterion;
  double eps;
  Activation activation;
  double negative_slope;
  double momentum;  // of the running statistics

  constexpr int64_t units() const { return modalities * groups; }
  constexpr int64_t unit(int64_t m, int64_t g) const { return m * groups + g; }
  constexpr int64_t values() const { return samples * spatial; }  // of one channel of a unit
  constexpr double unbiased() const {
    return double(values()) / double(values() - 1);
  }  // variance over biased
  constexpr int64_t unit_size() const { return samples * channels * spatial; }

  // The channels of modality m that may be exchanged (section 3.3).
  constexpr int64_t region_begin(int64_t m) const {
    return region == Region::own ? m * channels / modalities : 0;
  }
  constexpr int64_t region_end(int64_t m) const {
    return region == Region::own ? (m + 1) * channels / modalities : channels;
  }
};

// Tensors of x's size have x's memory layout. weight, bias and their gradients are [M, C]; statistics are
// [units, C].
template <class T>
struct ForwardTensors {
  const T* x;
  const Real<T>*weight, *bias;
  const Real<T>*mean, *var;  // given statistics, else null
  const T* residual;         // may be null
  T* y;
  Real<T>*batch_mean, *batch_var;      // those of x where none are given, else null
  Real<T>*running_mean, *running_var;  // [M, C], updated by those of x; may be null
};

template <class T>
struct BackwardTensors {
  const T *dy, *x;
  const Real<T>*weight, *bias, *mean, *var;
  const T* residual;  // may be null
  T* dx;
  Real<T>*dweight, *dbias;
  T* dresidual;  // null without a residual
};

// Whether Eq. 6 holds for a scale.
template <class R>
constexpr bool is_below(const Problem& p, R scale) {
  const R threshold = static_cast<R>(p.threshold);  // compared in weight's precision, as PyTorch does
  if (p.criterion == Criterion::signed_value) return scale <= threshold;
  return (scale < 0 ? -scale : scale) < threshold;
}

}  // namespace cen
