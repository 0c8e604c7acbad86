// What a call of the operator is about, in plain numbers and pointers: all that a kernel knows of it.
// The mathematics is defined in cen_ext/reference.py; names are those used there.
#pragma once

#include <cstdint>

namespace cen {

enum class Region { own, all };
enum class Criterion { magnitude, signed_value };  // "abs", "signed"
enum class Activation { identity, relu, leaky_relu };

struct Problem {
  int64_t modalities;  // M
  int64_t samples;     // N, of one modality
  int64_t channels;    // C
  int64_t spatial;     // product of the spatial sizes
  bool channels_last;  // x is [M, N, spatial, C] in memory, else [M, N, C, spatial]
  bool batch_statistics;
  double threshold;
  Region region;
  Criterion criterion;
  double eps;
  Activation activation;
  double negative_slope;

  int64_t values() const { return samples * spatial; }  // of one channel of one modality
  int64_t modality_size() const { return samples * channels * spatial; }
};

// Tensors of x's size have x's memory layout; weight, bias and statistics are [M, C].
template <class T>
struct ForwardTensors {
  const T *x, *weight, *bias;
  const T *mean, *var;  // given statistics, else null
  const T* residual;    // may be null
  T* y;
  T *batch_mean, *batch_var;  // those of x where none are given, else null
};

template <class T>
struct BackwardTensors {
  const T *dy, *x, *weight, *bias, *mean, *var;
  const T* residual;  // may be null
  T *dx, *dweight, *dbias;
  T* dresidual;  // null without a residual
};

// Whether the exchange replaces channel c of modality m (Eq. 6; section 3.3 for the region).
template <class T>
static inline bool is_replaced(const Problem& p, T scale, int64_t m, int64_t c) {
  if (p.modalities == 1 || p.threshold == 0) return false;
  const int64_t own_begin = m * p.channels / p.modalities;
  const int64_t own_end = (m + 1) * p.channels / p.modalities;
  if (p.region == Region::own && (c < own_begin || c >= own_end)) return false;
  const T threshold = static_cast<T>(p.threshold);  // compared in weight's precision, as PyTorch does
  if (p.criterion == Criterion::signed_value) return scale <= threshold;
  return (scale < 0 ? -scale : scale) < threshold;
}

}  // namespace cen
