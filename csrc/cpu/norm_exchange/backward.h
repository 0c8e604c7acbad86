// The backward pass: the sums of dz, dz * (x - shift) and x - shift per channel and unit, then
//   dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat))   with batch statistics, in a second pass,
//   dx = scale * dz                                          with given statistics, in the same pass.
// The argument of the activation is recomputed from x.
#pragma once

#include "forward.h"

namespace cen::cpu {
namespace {

struct Sums {
  double dz, dz_x, x;
};

CEN_INLINE Sums operator+(Sums a, Sums b) { return {a.dz + b.dz, a.dz_x + b.dz_x, a.x + b.x}; }

// The contribution of one unit to the gradients of a channel's weight and bias.
struct AffineGradient {
  double weight, bias;
};

// Sets the coefficients of dx from the sums of the channels of unit (m, g) from c on, which share statistics,
// and stores each one's contribution to the gradients of weight and bias. sums(c) are those of a channel.
// x - shift has a nonzero mean because shift is rounded; subtracting that mean here cancels the rounding.
template <class T, class SumsOf>
void finish_channels(const Problem& p, const BackwardTensors<T>& t, const Tables<Real<T>>& tables,
                     const Buffer<AffineGradient>& affine, int64_t m, int64_t g, int64_t c, SumsOf sums) {
  using R = Real<T>;
  const int64_t unit = p.unit(m, g), end = c + p.joined;
  const R* weight = t.weight + m * p.channels;
  AffineGradient* results = affine.get() + unit * p.channels;
  if (tables.at(unit, c).is_dead(c % kVecSize<R>)) {  // and by itself
    results[c] = {};
    return;
  }
  const int64_t i = p.statistic(unit, c);
  const double invstd = 1 / std::sqrt(t.var[i] + p.eps),
               per_value = 1 / static_cast<double>(p.joined * p.values());
  double x = 0, of_weight = 0, of_bias = 0;  // of the latter two with the scale of each channel
  if (p.batch_statistics)
    for (int64_t k = c; k < end; ++k) x += sums(k).x;
  const double center = x * per_value;
  for (int64_t k = c; k < end; ++k) {
    const Sums own = sums(k);
    results[k] = {invstd * (own.dz_x - own.dz * center), own.dz};
    const double scale = invstd * weight[k];
    of_weight += scale * invstd * results[k].weight;
    of_bias += scale * own.dz;
  }
  if (!p.batch_statistics) return;
  const double on_x = -of_weight * per_value, constant = -of_bias * per_value - on_x * center;
  for (int64_t k = c; k < end; ++k) {
    Slopes<R>& slopes = tables.slopes(unit)[k / kVecSize<R>];
    slopes.on_x[k % kVecSize<R>] = static_cast<R>(on_x);
    slopes.constant[k % kVecSize<R>] = static_cast<R>(constant);
  }
}

template <class T>
void write_affine_gradients(const Problem& p, const BackwardTensors<T>& t,
                            const Buffer<AffineGradient>& parts) {
  for (int64_t m = 0; m < p.modalities; ++m)
    for (int64_t c = 0; c < p.channels; ++c) {
      AffineGradient total{};
      for (int64_t g = 0; g < p.groups; ++g) {
        const AffineGradient& part = parts[p.unit(m, g) * p.channels + c];
        total = {total.weight + part.weight, total.bias + part.bias};
      }
      if (p.across_channels() && is_unread(p, t.weight, t.route, m, c)) total = {};
      t.dweight[m * p.channels + c] = static_cast<Real<T>>(total.weight);
      t.dbias[m * p.channels + c] = static_cast<Real<T>>(total.bias);
    }
}

// Sums per vector element along a strip. They are in R, and so run over at most one block.
template <class R>
struct StripSums {
  Vec<R> dz{}, dz_x{}, x{};

  template <class N>
  CEN_INLINE void add(Vec<R> dz_now, Vec<R> x_now, N n) {
    dz += first_elements<R>(dz_now, n);
    dz_x += first_elements<R>(dz_now * x_now, n);
    x += first_elements<R>(x_now, n);
  }
  CEN_INLINE StripSums operator+(const StripSums& o) const { return {dz + o.dz, dz_x + o.dz_x, x + o.x}; }
  CEN_INLINE Sums of_all_elements() const { return {sum_elements(dz), sum_elements(dz_x), sum_elements(x)}; }
};

// One pass along a strip of one unit: returns the sums if kSum, writes dx if kWrite, and dresidual unless
// null. walk(f) calls f(at, n, slot) for its vectors, with slots below kSlots to choose among independent
// accumulators. The other arguments are those of forward_strip.
template <bool kSum, bool kWrite, ActivationForm kForm, int64_t kSlots, class T, class Walk>
CEN_INLINE StripSums<Real<T>> backward_strip(const BackwardTensors<T>& t, const GroupInputs<T>& group,
                                             const Coefficients<Real<T>>* own, const Slopes<Real<T>>* slopes,
                                             int64_t element, int64_t m, bool any_exchanged,
                                             int64_t prefetch_distance, bool streamed, Walk walk) {
  using R = Real<T>;
  StripSums<R> sums;
  with_exchange(group.modalities, group.routed, any_exchanged, [&](auto exchange) CEN_INLINE_LAMBDA {
    const Strip<T, false, decltype(exchange)::value, kForm> strip(group, own, element, m);
    const Vec<R> on_x = splat(kSum ? R(0) : slopes->on_x[element]),
                 constant = splat(kSum ? R(0) : slopes->constant[element]);
    StripSums<R> slots[kSlots];
    walk([&](int64_t at, auto n, auto slot) CEN_INLINE_LAMBDA {
      strip.prefetch(at + prefetch_distance);
      const Vec<R> g = strip.g(at, n), dz = strip.dz(g, at, n), x = strip.centered(at, n);
      if constexpr (kSum) slots[slot].add(dz, x, n);
      if constexpr (kWrite)
        store(t.dx + at, kSum ? dz * strip.scale() : dz * strip.scale() + (x * on_x + constant), n, streamed);
      if (t.dresidual) store(t.dresidual + at, g, n, streamed);
    });
    sums = slots[0];
    for (int64_t slot = 1; slot < kSlots; ++slot) sums = sums + slots[slot];
  });
  return sums;
}

// One pass over line block b of channel c of unit (m, g). Returns the sums if kSum.
template <bool kSum, bool kWrite, ActivationForm kForm, class T>
Sums backward_block(const Problem& p, const BackwardTensors<T>& t, const Tables<Real<T>>& tables,
                    const GroupInputs<T>& group, const LineBlocks& blocks, int64_t m, int64_t g, int64_t c,
                    int64_t b, int64_t prefetch_distance) {
  using R = Real<T>;
  const int64_t element = c % kVecSize<R>;
  const Coefficients<R>& own = tables.at(p.unit(m, g), c);
  // Streaming needs both results at the same phase, because vectors are aligned for dx.
  const bool streamed = p.streaming_stores && (!t.dresidual || phase_of(t.dresidual) == phase_of(t.dx));
  // Two accumulators: with one, given statistics took 7.7 ms instead of 4.3 ms for [12, 64, 125, 125].
  const StripSums<R> sums = backward_strip<kSum, kWrite, kForm, 2>(
      t, group, &own, tables.slopes(p.unit(m, g)) + c / kVecSize<R>, element, m, own.exchanged[element],
      prefetch_distance, streamed, [&](auto f) CEN_INLINE_LAMBDA {
        blocks.walk<R, 2>(blocks.block(b), p.offset(m, g) + c * p.spatial, phase_of(t.dx), f);
      });
  return kSum ? sums.of_all_elements() : Sums{};
}

// One pass over rows [begin, end) of modality m, with arguments as those of forward_part. Adds to sums, which
// has one entry per strip.
template <bool kSum, bool kWrite, ActivationForm kForm, class T>
void backward_part(BackwardTensors<T> t, GroupInputs<T> group, RowBlocks blocks,
                   const Coefficients<Real<T>>* own, const Slopes<Real<T>>* slopes, int64_t m, int64_t first,
                   int64_t begin, int64_t end, int64_t distance, bool streamed, StripSums<Real<T>>* sums) {
  using R = Real<T>;
  const int64_t step = blocks.channels;
  TileResults<R> dx, dresidual;
  for_strips_of_rows(
      group, blocks, first, begin, end, distance,
      [&](int64_t tile, int64_t strip, auto n, auto rows) CEN_INLINE_LAMBDA {
        const bool exchanged = own[strip].any_exchanged;
        with_exchange(group.modalities, group.routed, exchanged, [&](auto exchange) CEN_INLINE_LAMBDA {
          const Strip<T, true, decltype(exchange)::value, kForm> values(group, own + strip, 0, m);
          StripSums<R> of_tile;
          walk_rows<kForm>(
              tile + strip * kVecSize<R>, step, rows, [&](int64_t at, int64_t r) CEN_INLINE_LAMBDA {
                const Vec<R> g = values.g(at, n), dz = values.dz(g, at, n), x = values.centered(at, n);
                if constexpr (kSum) of_tile.add(dz, x, n);
                if constexpr (kWrite && kSum) dx.put(r, strip, dz * values.scale());
                if constexpr (kWrite && !kSum) {
                  const Slopes<R>& k = slopes[strip];
                  dx.put(r, strip, dz * values.scale() + (x * load_row(k.on_x) + load_row(k.constant)));
                }
                if (t.dresidual) dresidual.put(r, strip, g);
              });
          if constexpr (kSum) sums[strip] = sums[strip] + of_tile;
        });
        if constexpr (kWrite) dx.store(t.dx, tile, step, strip, rows, n, streamed);
        if (t.dresidual) dresidual.store(t.dresidual, tile, step, strip, rows, n, streamed);
      });
}

template <class T>
BackwardTensors<T> without_dresidual(BackwardTensors<T> t) {
  t.dresidual = nullptr;
  return t;
}

template <ActivationForm kForm, class T>
void backward_channels_first(const Problem& p, const BackwardTensors<T>& t, const Tables<Real<T>>& tables,
                             const Buffer<AffineGradient>& affine, const Parallel& parallel) {
  // For short lines, the sums per line cost more than memory order saves.
  const bool in_order = !p.batch_statistics && p.spatial >= 2048;
  const LineBlocks blocks(p, in_order);
  const GroupInputs<T> group(p, tables, t.x, t.residual, t.dy);
  const BackwardTensors<T> sums_only = without_dresidual(t);
  const int64_t prefetch_distance = blocks.prefetch_distance(sizeof(T));
  const Buffer<Sums> sums(p.units() * p.channels * blocks.count);
  const auto of_channel = [&](int64_t m, int64_t g, int64_t c) {
    return sums.get() + (p.unit(m, g) * p.channels + c) * blocks.count;
  };
  const auto finish = [&](int64_t m, int64_t g, int64_t c) {
    finish_channels(p, t, tables, affine, m, g, c, [&](int64_t k) {
      Sums total{};
      for (int64_t b = 0; b < blocks.count; ++b) total = total + of_channel(m, g, k)[b];
      return total;
    });
  };
  if (in_order) {
    for_blocks_in_order(p, blocks, parallel, [&](int64_t g, int64_t c, int64_t b) {
      for (int64_t m = 0; m < p.modalities; ++m)
        of_channel(m, g, c)[b] =
            backward_block<true, true, kForm>(p, t, tables, group, blocks, m, g, c, b, prefetch_distance);
    });
    return parallel_tasks(parallel, p.units() * p.channels, [&](int64_t i) {
      const int64_t unit = i / p.channels;
      finish(unit / p.groups, unit % p.groups, i % p.channels);
    });
  }
  for_channel_blocks(
      p, tables, 2 * sizeof(T), parallel, [&](const ChannelBlock& channels, const Parallel& inner) {
        for_blocks(channels, blocks, inner, [&](int64_t m, int64_t c, int64_t b) {
          of_channel(m, channels.g, c)[b] =
              p.batch_statistics ? backward_block<true, false, kForm>(p, sums_only, tables, group, blocks, m,
                                                                      channels.g, c, b, prefetch_distance)
                                 : backward_block<true, true, kForm>(p, t, tables, group, blocks, m,
                                                                     channels.g, c, b, prefetch_distance);
        });
        for (int64_t m = channels.first_m; m < channels.last_m; ++m)
          for (int64_t c = channels.first_c; c < channels.last_c; c += p.joined) finish(m, channels.g, c);
        if (p.batch_statistics)
          for_blocks(channels, blocks, inner, [&](int64_t m, int64_t c, int64_t b) {
            backward_block<false, true, kForm>(p, t, tables, group, blocks, m, channels.g, c, b,
                                               channels.to_next(p));
          });
      });
}

template <ActivationForm kForm, class T>
void backward_channels_last(const Problem& p, const BackwardTensors<T>& t, const Tables<Real<T>>& tables,
                            const Buffer<AffineGradient>& affine, const Parallel& parallel) {
  using R = Real<T>;
  const RowBlocks blocks(p, 512);
  const GroupInputs<T> group(p, tables, t.x, t.residual, t.dy);
  const int64_t part = blocks.part((2 + (t.residual != nullptr)) * p.modalities * sizeof(T)),
                to_next = part * p.channels;
  const int64_t tasks = blocks.count * p.groups, padded = tables.strips * kVecSize<R>;
  // dx depends on dy, residual and activation through dresidual alone. Writing it in the first pass saves the
  // second one a read of the residual. Half types would round it, so they do without.
  const bool dresidual_first = kForm != ActivationForm::identity && t.dresidual && sizeof(T) >= sizeof(float);
  const BackwardTensors<T> first = dresidual_first ? t : without_dresidual(t);
  const bool streamed = p.streaming_stores && p.channels % kVecSize<R> == 0 && phase_of(t.dx) == 0 &&
                        (!t.dresidual || phase_of(t.dresidual) == 0);
  const BlockRows dz(blocks.count, p.units(), padded), dz_x(blocks.count, p.units(), padded),
      x(blocks.count, p.units(), padded);
  parallel_ranges(parallel, tasks, [&](int64_t begin, int64_t end) {
    const int64_t of_unit = tables.strips;
    const Buffer<StripSums<R>> all_sums(p.modalities * of_unit);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.groups, g = i % p.groups;
      std::memset(static_cast<void*>(all_sums.get()), 0, p.modalities * of_unit * sizeof(StripSums<R>));
      blocks.for_parts(b, part, [&](int64_t first_row, int64_t end_row) {
        for (int64_t m = 0; m < p.modalities; ++m) {
          StripSums<R>* sums = all_sums.get() + m * of_unit;
          const Coefficients<R>* own = tables.unit(p.unit(m, g));
          if (p.batch_statistics)
            backward_part<true, false, kForm>(first, group, blocks, own, nullptr, m, p.offset(m, g),
                                              first_row, end_row, to_next, streamed, sums);
          else
            backward_part<true, true, kForm>(t, group, blocks, own, nullptr, m, p.offset(m, g), first_row,
                                             end_row, to_next, streamed, sums);
        }
      });
      for (int64_t m = 0; m < p.modalities; ++m) {
        const int64_t unit = p.unit(m, g);
        const StripSums<R>* sums = all_sums.get() + m * of_unit;
        double *dz_row = dz.row(b, unit), *dz_x_row = dz_x.row(b, unit), *x_row = x.row(b, unit);
        for (int64_t strip = 0; strip < tables.strips; ++strip)
          for_wide_parts(
              [&](int64_t element, Vec<double> dz_now, Vec<double> dz_x_now, Vec<double> x_now) {
                const int64_t c = strip * kVecSize<R> + element;
                store_row(dz_row + c, dz_now);
                store_row(dz_x_row + c, dz_x_now);
                store_row(x_row + c, x_now);
              },
              sums[strip].dz, sums[strip].dz_x, sums[strip].x);
      }
    }
  });
  const auto finish = [&](int64_t unit, int64_t first_c, int64_t last_c) {
    const double *sum_dz = dz.row(0, unit), *sum_dz_x = dz_x.row(0, unit), *sum_x = x.row(0, unit);
    for (int64_t c = first_c; c < last_c; c += p.joined)
      finish_channels(p, t, tables, affine, unit / p.groups, unit % p.groups, c,
                      [&](int64_t k) { return Sums{sum_dz[k], sum_dz_x[k], sum_x[k]}; });
  };
  for_pieces(p, parallel, [&](int64_t unit, int64_t first_c, int64_t last_c) {
    const auto total = [&](const BlockRows& rows) {
      double* sum = rows.row(0, unit);
      for (int64_t b = 1; b < blocks.count; ++b) {
        const double* block = rows.row(b, unit);
        for (int64_t c = first_c; c < last_c; ++c) sum[c] += block[c];
      }
    };
    total(dz);
    total(dz_x);
    total(x);
    if (p.joined == 1) finish(unit, first_c, last_c);
  });
  if (p.joined > 1)  // the channels that share statistics may be in several pieces
    parallel_tasks(parallel, p.units(), [&](int64_t unit) { finish(unit, 0, p.channels); });
  if (!p.batch_statistics) return;
  const auto write = [&](const BackwardTensors<T>& second, auto form) {
    const GroupInputs<T> read(p, tables, second.x, second.residual, second.dy);
    // In reverse order of the first pass, so that each core finds what it read last in its cache.
    parallel_ranges(parallel, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i)
        blocks.for_parts_reversed(i / p.groups, part, [&](int64_t first_row, int64_t end_row) {
          for (int64_t m = 0; m < p.modalities; ++m) {
            const int64_t unit = p.unit(m, i % p.groups);
            backward_part<false, true, decltype(form)::value, T>(
                second, read, blocks, tables.unit(unit), tables.slopes(unit), m, p.offset(m, i % p.groups),
                first_row, end_row, -to_next, streamed, nullptr);
          }
        });
    });
  };
  if (!dresidual_first) return write(t, std::integral_constant<ActivationForm, kForm>{});
  BackwardTensors<T> second = without_dresidual(t);
  second.dy = t.dresidual;
  second.residual = nullptr;
  write(second, std::integral_constant<ActivationForm, ActivationForm::identity>{});
}

template <class T>
void backward(const Problem& p, const BackwardTensors<T>& t, const Parallel& parallel) {
  const Tables<Real<T>> tables(p, t.weight, t.route, p.batch_statistics);
  set_given_statistics(p, t, tables, parallel);
  const Buffer<AffineGradient> affine(p.units() * p.channels);
  with_form<T, true>(p.activation, [&](auto form) {
    constexpr ActivationForm kForm = decltype(form)::value;
    if (p.channels_last)
      backward_channels_last<kForm>(p, t, tables, affine, parallel);
    else
      backward_channels_first<kForm>(p, t, tables, affine, parallel);
  });
  write_affine_gradients(p, t, affine);
}

}  // namespace
}  // namespace cen::cpu
