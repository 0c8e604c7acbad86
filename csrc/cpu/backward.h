// Backward: the sums of dz, dz * (x - shift) and x - shift of every channel, then
//   dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat))   with the statistics of x,
//   dx = scale * dz                                          with given ones, written along with the sums.
// The activation's argument is computed again from x.
#pragma once

#include "forward.h"

namespace cen::cpu {
namespace {

struct Sums {
  double dz, dz_x, x;
};

CEN_INLINE Sums operator+(Sums a, Sums b) { return {a.dz + b.dz, a.dz_x + b.dz_x, a.x + b.x}; }

// dx = scale * dz + on_x * (x - shift) + constant.
template <class T>
struct GradientTables {
  const Tables<T>& tables;
  Buffer<T> on_x, constant;

  GradientTables(const Problem& p, const Tables<T>& tables)
      : tables(tables), on_x(p.modalities * tables.padded), constant(p.modalities * tables.padded) {}
};

// dweight and dbias of channel c of modality m, and with the statistics of x what dx needs of the sums.
// x - shift has a mean of its own, since shift was rounded: taken out here, the rounding does no harm.
template <class T>
void finish_channel(const Problem& p, const BackwardTensors<T>& t, GradientTables<T>& gradient, int64_t m,
                    int64_t c, Sums sums) {
  const int64_t i = m * p.channels + c, at = m * gradient.tables.padded + c;
  const double invstd = inverse_std(t.var[i], p.eps), k = static_cast<double>(p.values());
  const double centre = p.batch_statistics ? sums.x / k : 0;
  const double dweight = invstd * (sums.dz_x - sums.dz * centre);
  t.dbias[i] = static_cast<T>(sums.dz);
  t.dweight[i] = static_cast<T>(dweight);
  if (!p.batch_statistics) return;
  const double scale = invstd * t.weight[i];
  const double on_x = -scale * invstd * dweight / k;
  gradient.on_x[at] = static_cast<T>(on_x);
  gradient.constant[at] = static_cast<T>(-scale * sums.dz / k - on_x * centre);
}

template <class T, bool kChannelsLast, Activation kActivation>
struct BackwardLine {
  Line<T, kChannelsLast, kActivation> line;
  const GradientTables<T>& gradient;
  T *dx, *dresidual;  // the line in modality 0; dresidual may be null

  BackwardLine(const Problem& p, const BackwardTensors<T>& t, const GradientTables<T>& gradient,
               int64_t channel, int64_t offset)
      : line{gradient.tables, p, channel, t.x + offset, t.residual ? t.residual + offset : nullptr,
             t.dy + offset},
        gradient(gradient),
        dx(t.dx + offset),
        dresidual(t.dresidual ? t.dresidual + offset : nullptr) {}

  // Whether modality m has no part in y, in the whole line: its x need not be read, its gradients are zeros.
  CEN_INLINE bool dead(int64_t m) const {
    if constexpr (kChannelsLast) return false;
    return line.tables.dead[m * line.tables.padded + line.channel];
  }

  // x - shift, and 0 where x has no part in y.
  template <class N>
  CEN_INLINE Vec<T> centred(int64_t m, int64_t i, N n) const {
    const Vec<T> v = line.centred(m, i, n);
    if (kChannelsLast && line.exchanging(m, i)) return line.where(line.tables.dead, m, i, Vec<T>{}, v);
    return v;
  }

  template <class N>
  CEN_INLINE void write(int64_t m, int64_t i, N n, Vec<T> dz) const {
    Vec<T> d = dz * line.coefficient(line.tables.scale, m, i);
    if (line.problem.batch_statistics && !dead(m))
      d += centred(m, i, n) * line.coefficient(gradient.on_x, m, i) +
           line.coefficient(gradient.constant, m, i);
    store(dx + line.at(m, i), d, n);
    if (dresidual) store(dresidual + line.at(m, i), line.g(m, i, n), n);
  }

  // add(i, dz, x - shift, n) for the vectors of the line; with given statistics dx as well.
  template <class Add>
  CEN_INLINE void sum(int64_t m, int64_t size, Add add) const {
    for_vectors<T>(size, [&](int64_t i, auto n) {
      const Vec<T> dz = line.dz(m, i, n);
      if (!dead(m)) add(i, dz, centred(m, i, n), n);
      if (!line.problem.batch_statistics) write(m, i, n, dz);
    });
  }

  void write(int64_t m, int64_t size) const {
    for_vectors<T>(size, [&](int64_t i, auto n) { write(m, i, n, line.dz(m, i, n)); });
  }
};

template <class T, Activation kActivation>
void backward_channels_first(const Problem& p, const BackwardTensors<T>& t, GradientTables<T>& gradient,
                             const Parallel& parallel) {
  const LineBlocks blocks(p);
  const int64_t parts = p.modalities * blocks.count;
  const Buffer<Sums> sums(p.channels * parts);
  for_channels(p, parallel, [&](int64_t c, const Parallel& inner) {
    Sums* channel_sums = sums.get() + c * parts;
    parallel_tasks(inner, parts, [&](int64_t part) {
      Vec<T> sum_dz{}, sum_dz_x{}, sum_x{};
      blocks.for_lines(part % blocks.count, [&](int64_t offset, int64_t size) {
        const BackwardLine<T, false, kActivation> line(p, t, gradient, c, c * p.spatial + offset);
        line.sum(part / blocks.count, size, [&](int64_t, Vec<T> dz, Vec<T> x, auto n) {
          sum_dz += first_lanes<T>(dz, n);
          sum_dz_x += first_lanes<T>(dz * x, n);
          sum_x += first_lanes<T>(x, n);
        });
      });
      channel_sums[part] = {sum_lanes<T>(sum_dz), sum_lanes<T>(sum_dz_x), sum_lanes<T>(sum_x)};
    });
    for (int64_t m = 0; m < p.modalities; ++m) {
      Sums total{};
      for (int64_t b = 0; b < blocks.count; ++b) total = total + channel_sums[m * blocks.count + b];
      finish_channel(p, t, gradient, m, c, total);
    }
    if (!p.batch_statistics) return;
    parallel_tasks(inner, parts, [&](int64_t part) {
      blocks.for_lines(part % blocks.count, [&](int64_t offset, int64_t size) {
        const BackwardLine<T, false, kActivation> line(p, t, gradient, c, c * p.spatial + offset);
        line.write(part / blocks.count, size);
      });
    });
  });
}

template <class T, Activation kActivation>
void backward_channels_last(const Problem& p, const BackwardTensors<T>& t, GradientTables<T>& gradient,
                            const Parallel& parallel) {
  const RowBlocks blocks(p);
  const int64_t padded = gradient.tables.padded, table = p.modalities * p.channels;
  const Buffer<Sums> sums(blocks.count * table);
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    const Buffer<T> block(3 * p.modalities * padded);
    for (int64_t b = begin; b < end; ++b) {
      std::memset(block.get(), 0, 3 * p.modalities * padded * sizeof(T));
      for (int64_t row = blocks.begin(b); row < blocks.end(b); ++row) {
        const BackwardLine<T, true, kActivation> line(p, t, gradient, 0, row * p.channels);
        for (int64_t m = 0; m < p.modalities; ++m) {
          T* s = block.get() + 3 * m * padded;
          line.sum(m, p.channels, [&](int64_t i, Vec<T> dz, Vec<T> x, auto) {
            store(s + i, load(s + i) + dz, AllLanes<T>{});
            store(s + padded + i, load(s + padded + i) + dz * x, AllLanes<T>{});
            store(s + 2 * padded + i, load(s + 2 * padded + i) + x, AllLanes<T>{});
          });
        }
      }
      for (int64_t m = 0; m < p.modalities; ++m) {
        const T* s = block.get() + 3 * m * padded;
        for (int64_t c = 0; c < p.channels; ++c)
          sums[b * table + m * p.channels + c] = {s[c], s[padded + c], s[2 * padded + c]};
      }
    }
  });
  parallel_tasks(parallel, table, [&](int64_t i) {
    Sums total{};
    for (int64_t b = 0; b < blocks.count; ++b) total = total + sums[b * table + i];
    finish_channel(p, t, gradient, i / p.channels, i % p.channels, total);
  });
  if (!p.batch_statistics) return;
  // Backwards through each core's share: what was read last is still in its cache.
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    for (int64_t row = blocks.end(end - 1) - 1; row >= blocks.begin(begin); --row) {
      const BackwardLine<T, true, kActivation> line(p, t, gradient, 0, row * p.channels);
      for (int64_t m = 0; m < p.modalities; ++m) line.write(m, p.channels);
    }
  });
}

template <class T>
void backward(const Problem& p, const BackwardTensors<T>& t, const Parallel& parallel) {
  Tables<T> tables(p);
  tables.set_exchange(p, t.weight);
  set_given_statistics(p, t.mean, t.var, t.weight, t.bias, tables);
  GradientTables<T> gradient(p, tables);
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    if (p.channels_last)
      backward_channels_last<T, kActivation>(p, t, gradient, parallel);
    else
      backward_channels_first<T, kActivation>(p, t, gradient, parallel);
  });
}

}  // namespace
}  // namespace cen::cpu
