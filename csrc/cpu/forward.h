// Forward: statistics of x unless given, then normalise, exchange, add the residual, activate.
#pragma once

#include "statistics.h"

namespace cen::cpu {
namespace {

// Statistics of channel c of unit (m, g), where they are those of x, into the tables and the result.
template <class T>
CEN_INLINE void set_batch_statistics(const Problem& p, const ForwardTensors<T>& t, Tables<Real<T>>& tables,
                                     int64_t m, int64_t g, int64_t c, Moments moments) {
  const int64_t unit = p.unit(m, g), i = unit * p.channels + c;
  const double var = moments.squares / p.values();
  tables.set_affine(unit, c, moments.mean, var, p.eps, t.weight[m * p.channels + c],
                    t.bias[m * p.channels + c]);
  t.batch_mean[i] = static_cast<Real<T>>(moments.mean);
  t.batch_var[i] = static_cast<Real<T>>(var);
}

template <class T, class Tensors>
void set_given_statistics(const Problem& p, const Tensors& t, Tables<Real<T>>& tables) {
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    const int64_t own = unit / p.groups * p.channels, row = unit * p.channels;
    for (int64_t c = 0; c < p.channels; ++c)
      tables.set_affine(unit, c, t.mean[row + c], t.var[row + c], p.eps, t.weight[own + c], t.bias[own + c]);
  }
}

// y of one unit along a strip; walk(f) calls f(at, n) for its vectors. `ahead` leads from a vector to one that
// is soon read, 0 where the processor foresees it.
template <class T, bool kChannelsLast, class Walk>
CEN_INLINE void forward_strip(const Group<T>& group, const Branch<T>& own, const Branch<T>& partner, int64_t m,
                              int64_t channel, bool any_exchanged, T* y, int64_t ahead, bool streamed,
                              Walk walk) {
  with_exchange(group.modalities, any_exchanged, [&](auto exchange) CEN_INLINE_LAMBDA {
    const Strip<T, kChannelsLast, decltype(exchange)::value> strip(group, own, partner, m, channel);
    walk([&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      if (ahead) strip.prefetch(at + ahead);
      store(y + at, strip.y(at, n), n, streamed);
    });
  });
}

// f(g, c, inner) for every channel of every group: over them in parallel, or, where there are too few for the
// cores, one after the other with `inner` to share out the work within one.
template <class F>
void for_channels(const Problem& p, const Parallel& parallel, F f) {
  const int64_t tasks = p.groups * p.channels;
  const auto task = [&](int64_t i, const Parallel& inner) { f(i / p.channels, i % p.channels, inner); };
  if (tasks >= 4 * parallel.threads) {
    parallel_tasks(parallel, tasks, [&](int64_t i) { task(i, {1, nullptr}); });
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i, parallel);
  }
}

// f(first_m, last_m) for the modalities of a channel that have to be worked on together: all where they
// exchange, else one after the other, while what was read of it is in the cache.
template <class R, class F>
CEN_INLINE void for_partners(const Problem& p, const Tables<R>& tables, int64_t c, F f) {
  if (tables.exchanged[c]) return f(int64_t{0}, p.modalities);
  for (int64_t m = 0; m < p.modalities; ++m) f(m, m + 1);
}

// A channel of all samples mostly fits in the second-level cache: it comes from memory once, for the
// statistics, and from the cache for the output.
template <class T>
void forward_channels_first(const Problem& p, const ForwardTensors<T>& t, Tables<Real<T>>& tables,
                            const Parallel& parallel) {
  using R = Real<T>;
  const LineBlocks blocks(p);
  const Buffer<Moments> moments(p.batch_statistics ? p.units() * p.channels * blocks.count : 0);
  for_channels(p, parallel, [&](int64_t g, int64_t c, const Parallel& inner) {
    for_partners(p, tables, c, [&](int64_t first_m, int64_t last_m) {
      const int64_t parts = (last_m - first_m) * blocks.count;
      const Group<T> group(p, tables, t.x, t.residual, nullptr, g);
      const int64_t first = c * p.spatial;
      const auto block_of = [&](int64_t m) {
        return moments.get() + (p.unit(m, g) * p.channels + c) * blocks.count;
      };
      if (p.batch_statistics) {
        parallel_tasks(inner, parts, [&](int64_t part) {
          const int64_t m = first_m + part / blocks.count, b = part % blocks.count;
          block_of(m)[b] = block_moments(group.branch(m).x + first, blocks, b);
        });
        for (int64_t m = first_m; m < last_m; ++m)
          set_batch_statistics(p, t, tables, m, g, c,
                               join(
                                   blocks.count, p.values(), [&](int64_t b) { return block_of(m)[b]; },
                                   [&](int64_t b) { return blocks.block(b).values(); }));
      }
      parallel_tasks(inner, parts, [&](int64_t part) {
        const int64_t m = first_m + part % (last_m - first_m), b = part / (last_m - first_m);
        T* y = t.y + p.unit(m, g) * p.unit_size();
        forward_strip<T, false>(group, group.branch(m), group.partner(m), m, c, tables.exchanged[c], y, 0,
                                p.stream, [&](auto f) CEN_INLINE_LAMBDA {
                                  blocks.walk<R, 1>(
                                      blocks.block(b), first, phase_of(y),
                                      [&](int64_t at, auto n, auto) CEN_INLINE_LAMBDA { f(at, n); });
                                });
      });
    });
  });
}

template <class T>
void row_statistics(const Problem& p, const ForwardTensors<T>& t, const RowBlocks& blocks,
                    Tables<Real<T>>& tables, const Parallel& parallel) {
  const int64_t table = p.units() * p.channels;
  const Buffer<Moments> moments(blocks.count * table);
  parallel_ranges(parallel, blocks.count * p.units(), [&](int64_t begin, int64_t end) {
    const Buffer<MomentSums<Real<T>>> sums(tables.strips);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.units(), unit = i % p.units();
      block_moments(t.x + unit * p.unit_size(), blocks, b, sums.get(), moments.get() + i * p.channels);
    }
  });
  parallel_tasks(parallel, table, [&](int64_t i) {
    const int64_t unit = i / p.channels;
    const Moments joined = join(
        blocks.count, p.values(), [&](int64_t b) { return moments[b * table + i]; },
        [&](int64_t b) { return blocks.values(b); });
    set_batch_statistics(p, t, tables, unit / p.groups, unit % p.groups, i % p.channels, joined);
  });
}

template <class T>
void forward_channels_last(const Problem& p, const ForwardTensors<T>& t, Tables<Real<T>>& tables,
                           const Parallel& parallel) {
  using R = Real<T>;
  const RowBlocks blocks(p, sizeof(T), t.residual ? 2 : 1);
  if (p.batch_statistics) row_statistics(p, t, blocks, tables, parallel);
  const bool streamed = p.stream && p.channels % kLanes<R> == 0 && phase_of(t.y) == 0;
  // Backwards through each core's share: what the statistics read last is still in its cache.
  parallel_ranges(parallel, blocks.count * p.groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      const int64_t b = i / p.groups, g = i % p.groups;
      const Group<T> group(p, tables, t.x, t.residual, nullptr, g);
      for (int64_t m = 0; m < p.modalities; ++m) {
        const Branch<T> own = group.branch(m), partner = group.partner(m);
        T* y = t.y + p.unit(m, g) * p.unit_size();
        const int64_t ahead = blocks.ahead();
        blocks.for_tiles(b, [&](int64_t first_row, int64_t last_row) CEN_INLINE_LAMBDA {
          blocks.for_strips<R>([&](int64_t, int64_t channel, auto n) CEN_INLINE_LAMBDA {
            forward_strip<T, true>(
                group, own, partner, m, channel, tables.any_exchanged(channel), y, ahead, streamed,
                [&](auto f) CEN_INLINE_LAMBDA {
                  blocks.walk(first_row, last_row, channel,
                              [&](int64_t at) CEN_INLINE_LAMBDA { f(at, n); });
                });
          });
        });
      }
    }
  });
}

template <class T>
void forward(const Problem& p, const ForwardTensors<T>& t, const Parallel& parallel) {
  Tables<Real<T>> tables(p, t.weight);
  if (!p.batch_statistics) set_given_statistics<T>(p, t, tables);
  if (p.channels_last)
    forward_channels_last(p, t, tables, parallel);
  else
    forward_channels_first(p, t, tables, parallel);
}

}  // namespace
}  // namespace cen::cpu
