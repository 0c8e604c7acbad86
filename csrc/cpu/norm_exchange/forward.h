// The forward pass: compute the statistics of x unless given, normalize, exchange, add the residual,
// activate.
#pragma once

#include "statistics.h"

namespace cen::cpu {
namespace {

// Stores the statistics of the channels of unit (m, g) from c on, which share them, in the coefficient tables
// and in the results.
template <class T>
CEN_INLINE void set_batch_statistics(const Problem& p, const ForwardTensors<T>& t,
                                     const Tables<Real<T>>& tables, int64_t m, int64_t g, int64_t c,
                                     Moments moments) {
  const int64_t unit = p.unit(m, g), i = p.statistic(unit, c), own = m * p.channels;
  const double var = moments.squares / (p.joined * p.values());
  for (int64_t k = c; k < c + p.joined; ++k)
    tables.at(unit, k).set_affine(k % kVecSize<Real<T>>, moments.mean, var, p.eps, t.weight[own + k],
                                  t.bias[own + k]);
  t.batch_mean[i] = static_cast<Real<T>>(moments.mean);
  t.batch_var[i] = static_cast<Real<T>>(var);
}

// Calls f(unit, first_c, last_c) for pieces of the units' channels, in parallel for 1024 channels or more.
constexpr int64_t kPiece = 64;
template <class F>
void for_pieces(const Problem& p, const Parallel& parallel, F f) {
  const int64_t pieces = divide_up(p.channels, kPiece);
  const Parallel serial{1, nullptr};
  parallel_tasks(p.units() * p.channels < 1024 ? serial : parallel, p.units() * pieces, [&](int64_t i) {
    const int64_t c = i % pieces * kPiece;
    f(i / pieces, c, smaller(c + kPiece, p.channels));
  });
}

template <class R, class Tensors>
void set_given_statistics(const Problem& p, const Tensors& t, const Tables<R>& tables,
                          const Parallel& parallel) {
  for_pieces(p, parallel, [&](int64_t unit, int64_t first_c, int64_t last_c) {
    const int64_t own = unit / p.groups * p.channels;
    for (int64_t c = first_c; c < last_c; ++c) {
      const int64_t i = p.statistic(unit, c);
      tables.at(unit, c).set_affine(c % kVecSize<R>, t.mean[i], t.var[i], p.eps, t.weight[own + c],
                                    t.bias[own + c]);
    }
  });
}

// Writes y of one unit along a strip. walk(f) calls f(at, n) for its vectors; own and element are as in
// Strip; `prefetch_distance` is in values.
template <class T, ActivationForm kForm, class Walk>
CEN_INLINE void forward_strip(const GroupInputs<T>& group, const Coefficients<Real<T>>* own, int64_t element,
                              int64_t m, bool borrows, T* y, int64_t prefetch_distance, bool streamed,
                              Walk walk) {
  with_exchange(group.modalities, group.routed, borrows, [&](auto exchange) CEN_INLINE_LAMBDA {
    const Strip<T, false, decltype(exchange)::value, kForm> strip(group, own, element, m);
    walk([&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      strip.prefetch(at + prefetch_distance);
      store(y + at, strip.y(at, n), n, streamed);
    });
  });
}

// A cache block: channels [first_c, last_c) of modalities [first_m, last_m) of group g.
struct ChannelBlock {
  int64_t g, first_c, last_c, first_m, last_m;

  // Offset from a value to one of the next block. Writing a block prefetches the next one, so that memory
  // reads and writes overlap: forward took 1.05 to 1.4 times as long without.
  int64_t to_next(const Problem& p) const {
    if (last_m < p.modalities) return p.modality_stride();
    return (last_c - first_c) * p.spatial - first_m * p.modality_stride();
  }
};

// Calls f(block, inner) for blocks of channels that fit in the L2 cache: in parallel over blocks, or, with
// too few blocks for the threads, one by one with `inner` for parallelism within a block. A channel that
// exceeds the cache on its own is split by modality unless it is exchanged. Channels that share statistics
// are in one block.
template <class R, class F>
void for_channel_blocks(const Problem& p, const Tables<R>& tables, int64_t bytes_per_value,
                        const Parallel& parallel, F f) {
  constexpr int64_t kBytes = 1 << 17, kChannels = 16;
  const int64_t each = 4 * parallel.threads, channels = p.groups * p.channels;
  const int64_t fit = kBytes / (p.modalities * p.values() * bytes_per_value);
  const int64_t fitting = larger(1, smaller(smaller(fit, kChannels), channels / each)),
                size = divide_up(fitting, p.joined) * p.joined;
  const int64_t per_group = divide_up(p.channels, size), tasks = p.groups * per_group;
  const auto task = [&](int64_t i, const Parallel& inner) {
    const int64_t g = i / per_group, c = i % per_group * size;
    if (fit >= 1 || p.joined > 1 || tables.at(g, c).exchanged[c % kVecSize<R>])
      return f(ChannelBlock{g, c, smaller(c + size, p.channels), 0, p.modalities}, inner);
    for (int64_t m = 0; m < p.modalities; ++m) f(ChannelBlock{g, c, c + 1, m, m + 1}, inner);
  };
  if (tasks >= each) {
    parallel_tasks(parallel, tasks, [&](int64_t i) { task(i, {1, nullptr}); });
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i, parallel);
  }
}

// Calls f(m, c, b) for the line blocks b of the channels, modalities innermost, so
// that blocks that exchange are in the cache together.
template <class F>
CEN_INLINE void for_blocks(const ChannelBlock& channels, const LineBlocks& blocks, const Parallel& inner,
                           F f) {
  for (int64_t c = channels.first_c; c < channels.last_c; ++c)
    parallel_tasks(inner, blocks.count, [&](int64_t b) {
      for (int64_t m = channels.first_m; m < channels.last_m; ++m) f(m, c, b);
    });
}

// Calls f(g, c, b) for the line blocks of all channels in memory order. No block may exceed a line.
template <class F>
void for_blocks_in_order(const Problem& p, const LineBlocks& blocks, const Parallel& parallel, F f) {
  parallel_ranges(parallel, p.groups * blocks.count * p.channels, [&](int64_t begin, int64_t end) {
    int64_t piece = begin % blocks.pieces, c = begin / blocks.pieces % p.channels;
    int64_t line = begin / blocks.pieces / p.channels;  // of all groups
    for (int64_t i = begin; i < end; ++i) {
      f(line / blocks.lines, c, line % blocks.lines * blocks.pieces + piece);
      if (++piece < blocks.pieces) continue;
      piece = 0;
      if (++c < p.channels) continue;
      c = 0;
      ++line;
    }
  });
}

// A channel block of x is read from memory for the statistics and from the cache for the output.
template <ActivationForm kForm, class T>
void forward_channels_first(const Problem& p, const ForwardTensors<T>& t, const Tables<Real<T>>& tables,
                            const Parallel& parallel) {
  using R = Real<T>;
  const LineBlocks blocks(p, !p.batch_statistics);
  const GroupInputs<T> group(p, tables, t.x, t.residual, nullptr);
  const int64_t phase = phase_of(t.y), prefetch_distance = blocks.prefetch_distance(sizeof(T));
  const auto channel_offset = [&](int64_t m, int64_t g, int64_t c) { return p.offset(m, g) + c * p.spatial; };
  const auto write = [&](int64_t m, int64_t g, int64_t c, int64_t b, int64_t prefetch_distance) {
    const Coefficients<R>& own = tables.at(p.unit(m, g), c);
    const int64_t element = c % kVecSize<R>;
    forward_strip<T, kForm>(group, &own, element, m, own.replaced[element] != 0, t.y, prefetch_distance,
                            p.streaming_stores, [&](auto f) CEN_INLINE_LAMBDA {
                              blocks.walk<R, 1>(blocks.block(b), channel_offset(m, g, c), phase,
                                                [&](int64_t at, auto n, auto)
                                                    CEN_INLINE_LAMBDA { f(at, n); });
                            });
  };
  if (!p.batch_statistics)
    return for_blocks_in_order(p, blocks, parallel, [&](int64_t g, int64_t c, int64_t b) {
      for (int64_t m = 0; m < p.modalities; ++m) write(m, g, c, b, prefetch_distance);
    });

  const Buffer<Moments> moments(p.units() * p.channels * blocks.count);
  for_channel_blocks(
      p, tables, sizeof(T), parallel, [&](const ChannelBlock& channels, const Parallel& inner) {
        const auto of_channel = [&](int64_t m, int64_t c) {
          return moments.get() + (p.unit(m, channels.g) * p.channels + c) * blocks.count;
        };
        for_blocks(channels, blocks, inner, [&](int64_t m, int64_t c, int64_t b) {
          of_channel(m, c)[b] = block_moments(t.x, channel_offset(m, channels.g, c), blocks, b);
        });
        for (int64_t m = channels.first_m; m < channels.last_m; ++m)
          for (int64_t c = channels.first_c; c < channels.last_c; c += p.joined) {
            const Moments* parts = of_channel(m, c);  // those of the next channels follow
            set_batch_statistics(
                p, t, tables, m, channels.g, c,
                join(
                    p.joined * blocks.count, p.joined * p.values(), [&](int64_t b) { return parts[b]; },
                    [&](int64_t b) { return blocks.block(b % blocks.count).values(); }));
          }
        for_blocks(channels, blocks, inner,
                   [&](int64_t m, int64_t c, int64_t b) { write(m, channels.g, c, b, channels.to_next(p)); });
      });
}

template <class T>
void row_statistics(const Problem& p, const ForwardTensors<T>& t, const Tables<Real<T>>& tables,
                    const Parallel& parallel) {
  const RowBlocks blocks(p, 128);
  const int64_t padded = tables.strips * kVecSize<Real<T>>;
  const BlockRows means(blocks.count, p.units(), padded), squares(blocks.count, p.units(), padded);
  parallel_ranges(parallel, blocks.count * p.units(), [&](int64_t begin, int64_t end) {
    const Buffer<MomentSums<Real<T>>> sums(tables.strips);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.units(), unit = i % p.units();
      block_moments(t.x + p.offset(unit / p.groups, unit % p.groups), blocks, b, sums.get(),
                    means.row(b, unit), squares.row(b, unit));
    }
  });
  // The formula of join(), vectorized over channels.
  for_pieces(p, parallel, [&](int64_t unit, int64_t first_c, int64_t last_c) {
    double* mean = means.row(0, unit);
    double* sum_squares = squares.row(0, unit);
    double first[kPiece], shift[kPiece] = {};
    const int64_t count = last_c - first_c;
    for (int64_t i = 0; i < count; ++i) first[i] = mean[first_c + i];
    for (int64_t b = 1; b < blocks.count; ++b) {
      const double weight = static_cast<double>(blocks.values(b)) / p.values();
      const double* block = means.row(b, unit) + first_c;
      for (int64_t i = 0; i < count; ++i) shift[i] += weight * (block[i] - first[i]);
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const double values = static_cast<double>(blocks.values(b));
      const double *block = means.row(b, unit) + first_c, *block_squares = squares.row(b, unit) + first_c;
      for (int64_t i = 0; i < count; ++i) {
        const double d = block[i] - first[i] - shift[i];
        sum_squares[first_c + i] =
            (b ? sum_squares[first_c + i] + block_squares[i] : block_squares[i]) + values * d * d;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      mean[first_c + i] = first[i] + shift[i];
      if (p.joined > 1) continue;  // the channels that share statistics may be in several pieces
      set_batch_statistics(p, t, tables, unit / p.groups, unit % p.groups, first_c + i,
                           {mean[first_c + i], sum_squares[first_c + i]});
    }
  });
  if (p.joined == 1) return;
  parallel_tasks(parallel, p.units(), [&](int64_t unit) {
    const double *mean = means.row(0, unit), *sum_squares = squares.row(0, unit);
    for (int64_t c = 0; c < p.channels; c += p.joined)
      set_batch_statistics(p, t, tables, unit / p.groups, unit % p.groups, c,
                           join(
                               p.joined, p.joined * p.values(),
                               [&](int64_t i) { return Moments{mean[c + i], sum_squares[c + i]}; },
                               [&](int64_t) { return p.values(); }));
  });
}

// Writes y of modality m in rows [begin, end) of a part. Its arguments are values, which no store of a vector
// can change, as compilers see. own: the coefficients of the unit's strips; the others as in
// for_strips_of_rows().
template <ActivationForm kForm, class T>
void forward_part(GroupInputs<T> group, RowBlocks blocks, const Coefficients<Real<T>>* own, int64_t m,
                  int64_t first, int64_t begin, int64_t end, int64_t distance, T* y, bool streamed) {
  using R = Real<T>;
  const int64_t step = blocks.channels;
  TileResults<R> results;
  for_strips_of_rows(
      group, blocks, first, begin, end, distance,
      [&](int64_t tile, int64_t strip, auto n, auto rows) CEN_INLINE_LAMBDA {
        const bool borrows = own[strip].any_replaced;
        with_exchange(group.modalities, group.routed, borrows, [&](auto exchange) CEN_INLINE_LAMBDA {
          const Strip<T, true, decltype(exchange)::value, kForm> values(group, own + strip, 0, m);
          walk_rows<kForm>(tile + strip * kVecSize<R>, step, rows,
                           [&](int64_t at, int64_t r)
                               CEN_INLINE_LAMBDA { results.put(r, strip, values.y(at, n)); });
        });
        results.store(y, tile, step, strip, rows, n, streamed);
      });
}

template <ActivationForm kForm, class T>
void forward_channels_last(const Problem& p, const ForwardTensors<T>& t, const Tables<Real<T>>& tables,
                           const Parallel& parallel) {
  using R = Real<T>;
  const RowBlocks blocks(p, 512);
  const GroupInputs<T> group(p, tables, t.x, t.residual, nullptr);
  if (p.batch_statistics) row_statistics(p, t, tables, parallel);
  const bool streamed = p.streaming_stores && p.channels % kVecSize<R> == 0 && phase_of(t.y) == 0;
  const int64_t part = blocks.part(p.modalities * sizeof(T)), to_next = part * p.channels;
  parallel_ranges(parallel, blocks.count * p.groups, [&](int64_t begin, int64_t end) {
    const auto write = [&](int64_t g, int64_t first_row, int64_t end_row, int64_t distance) {
      for (int64_t m = 0; m < p.modalities; ++m)
        forward_part<kForm>(group, blocks, tables.unit(p.unit(m, g)), m, p.offset(m, g), first_row, end_row,
                            distance, t.y, streamed);
    };
    if (!p.batch_statistics) {
      for (int64_t i = begin; i < end; ++i)
        blocks.for_parts(i / p.groups, part, [&](int64_t first_row, int64_t end_row) {
          write(i % p.groups, first_row, end_row, to_next);
        });
      return;
    }
    // In reverse order of the statistics pass, so that each core finds what it read last in its cache.
    for (int64_t i = end - 1; i >= begin; --i)
      blocks.for_parts_reversed(i / p.groups, part, [&](int64_t first_row, int64_t end_row) {
        write(i % p.groups, first_row, end_row, -to_next);
      });
  });
}

template <class T>
void forward(const Problem& p, const ForwardTensors<T>& t, const Parallel& parallel) {
  const Tables<Real<T>> tables(p, t.weight, t.route);
  if (!p.batch_statistics) set_given_statistics(p, t, tables, parallel);
  with_form<T, true>(p.activation, [&](auto form) {
    constexpr ActivationForm kForm = decltype(form)::value;
    if (p.channels_last)
      forward_channels_last<kForm>(p, t, tables, parallel);
    else
      forward_channels_first<kForm>(p, t, tables, parallel);
  });
}

}  // namespace
}  // namespace cen::cpu
