// Forward: statistics of x unless given, then normalise, exchange, add the residual, activate.
#pragma once

#include "statistics.h"

namespace cen::cpu {
namespace {

// Statistics of channel c of modality m, where they are those of x, into the tables and the result.
template <class T>
CEN_INLINE void set_batch_statistics(const Problem& p, const ForwardTensors<T>& t, Tables<T>& tables,
                                     int64_t m, int64_t c, Moments moments) {
  const int64_t i = m * p.channels + c;
  const double var = moments.squares / p.values();
  tables.set_affine(m, c, moments.mean, inverse_std(var, p.eps), t.weight[i], t.bias[i]);
  t.batch_mean[i] = static_cast<T>(moments.mean);
  t.batch_var[i] = static_cast<T>(var);
}

template <class T>
void set_given_statistics(const Problem& p, const T* mean, const T* var, const T* weight, const T* bias,
                          Tables<T>& tables) {
  for (int64_t m = 0; m < p.modalities; ++m)
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t i = m * p.channels + c;
      tables.set_affine(m, c, mean[i], inverse_std(var[i], p.eps), weight[i], bias[i]);
    }
}

// y of modality m in one strip, whose first value lies at `first`; walk(f) calls f(at, n) for its vectors.
// `ahead` leads from a vector to one that is soon read, 0 where the processor foresees it.
template <class T, bool kChannelsLast, Activation kActivation, class Walk>
CEN_INLINE void forward_strip(const Problem& p, const ForwardTensors<T>& t, const Tables<T>& tables,
                              int64_t m, int64_t channel, int64_t first, int64_t ahead, Walk walk) {
  T* y = t.y + m * p.modality_size() + first;
  const T* residual = t.residual ? t.residual + first : nullptr;
  with_exchange(p, any_lane<T, kChannelsLast>(tables, tables.replaced, m, channel), [&](auto exchange) {
    const Strip<T, kChannelsLast, kActivation, decltype(exchange)::value> strip{
        p, tables, t.x + first, residual, nullptr, channel, m};
    walk([&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      if (ahead) strip.prefetch(at + ahead);
      store(y + at, strip.y(at, n), n);
    });
  });
}

// f(c, inner) for every channel: over the channels in parallel, or, where there are too few of them for the
// cores, one after the other with `inner` to share out the work within one.
template <class F>
void for_channels(const Problem& p, const Parallel& parallel, F f) {
  const Parallel serial{1, nullptr};
  if (p.channels >= 4 * parallel.threads) {
    parallel_tasks(parallel, p.channels, [&](int64_t c) { f(c, serial); });
  } else {
    for (int64_t c = 0; c < p.channels; ++c) f(c, parallel);
  }
}

// A channel of all samples and modalities mostly fits in the second-level cache: it comes from memory once,
// for the statistics, and from the cache for the output.
template <class T, Activation kActivation>
void forward_channels_first(const Problem& p, const ForwardTensors<T>& t, Tables<T>& tables,
                            const Parallel& parallel) {
  const LineBlocks blocks(p);
  const int64_t parts = p.modalities * blocks.count;
  const Buffer<Moments> moments(p.batch_statistics ? p.channels * parts : 0);
  for_channels(p, parallel, [&](int64_t c, const Parallel& inner) {
    const T* x = t.x + c * p.spatial;
    if (p.batch_statistics) {
      Moments* parts_of = moments.get() + c * parts;
      parallel_tasks(inner, parts, [&](int64_t part) {
        parts_of[part] =
            block_moments(x + part / blocks.count * p.modality_size(), blocks, part % blocks.count);
      });
      for (int64_t m = 0; m < p.modalities; ++m)
        set_batch_statistics(
            p, t, tables, m, c,
            join(
                blocks.count, p.values(), [&](int64_t b) { return parts_of[m * blocks.count + b]; },
                [&](int64_t b) { return blocks.values(b); }));
    }
    parallel_tasks(inner, blocks.count, [&](int64_t b) {
      for (int64_t m = 0; m < p.modalities; ++m)
        forward_strip<T, false, kActivation>(
            p, t, tables, m, c, c * p.spatial, 0, [&](auto f) CEN_INLINE_LAMBDA {
              blocks.walk<T, 1>(b, [&](int64_t at, auto n, auto) CEN_INLINE_LAMBDA { f(at, n); });
            });
    });
  });
}

template <class T>
void row_statistics(const Problem& p, const ForwardTensors<T>& t, const RowBlocks& blocks, Tables<T>& tables,
                    const Parallel& parallel) {
  const int64_t table = p.modalities * p.channels;
  const Buffer<Moments> moments(blocks.count * table);
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    const Buffer<MomentSums<T>> sums(blocks.strips<T>());
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = 0; m < p.modalities; ++m)
        block_moments(t.x + m * p.modality_size(), blocks, b, sums.get(),
                      moments.get() + b * table + m * p.channels);
  });
  parallel_tasks(parallel, table, [&](int64_t i) {
    const Moments joined = join(
        blocks.count, p.values(), [&](int64_t b) { return moments[b * table + i]; },
        [&](int64_t b) { return blocks.values(b); });
    set_batch_statistics(p, t, tables, i / p.channels, i % p.channels, joined);
  });
}

template <class T, Activation kActivation>
void forward_channels_last(const Problem& p, const ForwardTensors<T>& t, Tables<T>& tables,
                           const Parallel& parallel) {
  const RowBlocks blocks(p);
  if (p.batch_statistics) row_statistics(p, t, blocks, tables, parallel);
  // Backwards through each core's share: what the statistics read last is still in its cache.
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    for (int64_t b = end - 1; b >= begin; --b)
      blocks.for_tiles(b, [&](int64_t first_row, int64_t last_row) {
        blocks.for_strips<T>([&](int64_t, int64_t channel, auto n) {
          for (int64_t m = 0; m < p.modalities; ++m)
            forward_strip<T, true, kActivation>(
                p, t, tables, m, channel, channel, blocks.ahead(), [&](auto f) CEN_INLINE_LAMBDA {
                  blocks.walk<1>(first_row, last_row, [&](int64_t at, auto) CEN_INLINE_LAMBDA { f(at, n); });
                });
        });
      });
  });
}

template <class T>
void forward(const Problem& p, const ForwardTensors<T>& t, const Parallel& parallel) {
  Tables<T> tables(p);
  tables.set_exchange(p, t.weight);
  if (!p.batch_statistics) set_given_statistics(p, t.mean, t.var, t.weight, t.bias, tables);
  with_activation(p.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    if (p.channels_last)
      forward_channels_last<T, kActivation>(p, t, tables, parallel);
    else
      forward_channels_first<T, kActivation>(p, t, tables, parallel);
  });
}

}  // namespace
}  // namespace cen::cpu
