// The blocks of x, and the mean and variance of a channel from those of its blocks.
#pragma once

#include "rows.h"

namespace cen::cpu {
namespace {

// Mean and sum of squared deviations from it.
struct Moments {
  double mean, squares;
};

// Moments from the sums of d and d * d over `count` values, where d = x - shift.
CEN_INLINE Moments moments_of(double shift, double sum, double squares, int64_t count) {
  const double mean = sum / count, centered = squares - sum * mean;
  return {shift + mean, centered < 0 ? 0 : centered};
}

// Combines the moments of blocks. block(b) returns those of block b, count(b) its number of values.
template <class Block, class Count>
CEN_INLINE Moments join(int64_t blocks, int64_t total, Block block, Count count) {
  if (blocks == 1) return block(0);
  const double shift = block(0).mean;
  double sum = 0;
  for (int64_t b = 1; b < blocks; ++b) sum += count(b) * (block(b).mean - shift);
  const double mean = shift + sum / total;
  double squares = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const double d = block(b).mean - mean;
    squares += block(b).squares + count(b) * d * d;
  }
  return {mean, squares};
}

// The sums of d = x - shift and d * d over at most one block, in R. shift is the mean of a sample, the first
// values (or rows) of the block. By Cauchy-Schwarz n * (shift - mean)^2 <= n / sample * squares for any
// values, so subtracting the mean cancels at most log2(n / sample) bits of R.
template <class R>
struct MomentSums {
  static constexpr int64_t kSampleRows = 8;
  Vec<R> shift, sum{}, squares{};

  CEN_INLINE void add(Vec<R> d) {
    sum += d;
    squares += d * d;
  }
};

// The moments of a block in double, for squares that overflow R and for NaN. values(f) calls f(x) for every
// value of the block.
template <class Values>
__attribute__((noinline, cold)) Moments wide_moments(int64_t count, Values values) {
  double shift = 0, sum = 0, squares = 0;
  bool first = true;
  values([&](double x) {
    if (first) shift = x;
    first = false;
    sum += x - shift;
    squares += (x - shift) * (x - shift);
  });
  return moments_of(shift, sum, squares, count);
}

CEN_INLINE bool is_finite(double v) { return v - v == 0; }

template <int64_t kSlot>
using Slot = std::integral_constant<int64_t, kSlot>;

// Calls f(at, n, slot) for the vectors that cover the values [at, stop). n is FullVec for whole vectors,
// where phase + at is a multiple of the vector size, else the number of values up to the next multiple or the
// end. slot cycles through the constants [0, kSlots), to choose among independent accumulators.
template <class R, int64_t kSlots, class F>
CEN_INLINE void walk_values(int64_t at, int64_t stop, int64_t phase, F f) {
  constexpr int64_t kStep = kVecSize<R>;
  constexpr FullVec<R> all;
  while (at < stop) {
    const int64_t n = smaller(stop - at, kStep - (phase + at) % kStep);
    if (n < kStep) {
      f(at, n, Slot<0>{});
      at += n;
      continue;
    }
    if constexpr (kSlots >= 2)
      for (; at + kSlots * kStep <= stop; at += kSlots * kStep) {
        f(at, all, Slot<0>{});
        f(at + kStep, all, Slot<1>{});
        if constexpr (kSlots == 4) {
          f(at + 2 * kStep, all, Slot<2>{});
          f(at + 3 * kStep, all, Slot<3>{});
        }
      }
    for (; at + kStep <= stop; at += kStep) f(at, all, Slot<0>{});
  }
}

// Blocks of the lines (samples) of one channel of a unit, for channels first. A block has several whole
// lines, or a piece of one long line.
struct LineBlocks {
  static constexpr int64_t kValues = 8192;  // per block, so that the second pass over it hits the L1 cache
  static constexpr int64_t kLines = 128;    // per block at most, to bound the rounding of element sums
  int64_t lines, size, stride;              // `samples` lines of `size` values, `stride` apart
  int64_t lines_per_block, pieces, piece;
  int64_t count;

  // in_order limits a block to one line, so that blocks can be processed in memory order.
  LineBlocks(const Problem& p, bool in_order) : lines(p.samples), size(p.spatial), stride(p.sample_stride()) {
    lines_per_block = in_order ? 1 : larger(1, smaller(kLines, kValues / size));
    pieces = divide_up(size, kValues);
    piece = divide_up(divide_up(size, pieces), 64) * 64;
    pieces = divide_up(size, piece);
    count = divide_up(lines, lines_per_block) * pieces;
  }

  // The prefetch distance in values: the next line where lines are too short for the hardware prefetcher.
  int64_t prefetch_distance(int64_t bytes_per_value) const {
    return lines > 1 && size * bytes_per_value <= 8192 ? stride : 1024 / bytes_per_value;
  }

  struct Block {
    int64_t first_line, last_line, begin, end;  // values [begin, end) of lines [first_line, last_line)
    int64_t values() const { return (last_line - first_line) * (end - begin); }
  };
  CEN_INLINE Block block(int64_t b) const {
    if (pieces == 1) {
      const int64_t first = b * lines_per_block;
      return {first, smaller(lines, first + lines_per_block), 0, size};
    }
    const int64_t line = b / pieces, begin = b % pieces * piece;
    return {line, line + 1, begin, smaller(size, begin + piece)};
  }

  // The first values of a block, at least a 32nd of it.
  CEN_INLINE Block sample(const Block& block) const {
    const int64_t sampled = divide_up(block.last_line - block.first_line, 32);
    return {block.first_line, block.first_line + sampled, block.begin, smaller(block.end, block.begin + 256)};
  }

  // Calls f as walk_values() does, for a block of the channel that begins at offset `first`. `phase` is that
  // of offset 0.
  template <class R, int64_t kSlots, class F>
  CEN_INLINE void walk(const Block& block, int64_t first, int64_t phase, F f) const {
    for (int64_t line = block.first_line; line < block.last_line; ++line) {
      const int64_t at = first + line * stride;
      walk_values<R, kSlots>(at + block.begin, at + block.end, phase, f);
    }
  }
};

// The moments of block b of the channel that begins at offset `first` of x. A value's offset determines the
// vector element that sums it, so the result is bitwise independent of the address of x.
template <class T>
Moments block_moments(const T* x, int64_t first, const LineBlocks& blocks, int64_t b) {
  using R = Real<T>;
  const LineBlocks::Block block = blocks.block(b), sample = blocks.sample(block);
  const Vec<R> x0 = splat(load(x + first + block.first_line * blocks.stride + block.begin, int64_t{1})[0]);
  Vec<R> sum{};
  blocks.walk<R, 1>(sample, first, 0, [&](int64_t at, auto n, auto) CEN_INLINE_LAMBDA {
    sum += first_elements<R>(load(x + at, n) - x0, n);
  });
  const R shift = x0[0] + static_cast<R>(sum_elements(sum) / sample.values());

  MomentSums<R> sums[4];
  const int64_t prefetch_distance = blocks.prefetch_distance(sizeof(T));
  blocks.walk<R, 4>(block, first, 0, [&](int64_t at, auto n, auto slot) CEN_INLINE_LAMBDA {
    __builtin_prefetch(x + at + prefetch_distance);
    sums[slot].add(first_elements<R>(load(x + at, n) - splat(shift), n));
  });
  const double squares =
      sum_elements((sums[0].squares + sums[1].squares) + (sums[2].squares + sums[3].squares));
  if (!is_finite(squares))
    return wide_moments(block.values(), [&](auto f) {
      blocks.walk<R, 1>(block, first, 0, [&](int64_t at, int64_t n, auto) {
        for (int64_t element = 0; element < n; ++element) f(load(x + at + element, int64_t{1})[0]);
      });
    });
  return moments_of(shift, sum_elements((sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum)), squares,
                    block.values());
}

// Writes the moments of a block's channels to mean and squares. sums is scratch with one entry per strip.
template <class T>
void block_moments(const T* unit, const RowBlocks& blocks, int64_t b, MomentSums<Real<T>>* sums, double* mean,
                   double* squares) {
  using R = Real<T>;
  const int64_t begin = blocks.begin(b), count = blocks.values(b), step = blocks.channels;
  const int64_t sample = smaller(MomentSums<R>::kSampleRows, count),
                prefetch_distance = blocks.prefetch_distance(sizeof(T));
  int64_t sampled[MomentSums<R>::kSampleRows];
  for (int64_t row = 0; row < sample; ++row) sampled[row] = blocks.offset(begin + row);
  blocks.for_strips<R>([&](int64_t strip, auto n) {
    const T* first = unit + strip * kVecSize<R>;
    const Vec<R> x0 = load(first + sampled[0], n);
    Vec<R> sum{};
    for (int64_t row = 1; row < sample; ++row) sum += load(first + sampled[row], n) - x0;
    sums[strip] = {x0 + sum / static_cast<R>(sample)};
  });
  blocks.for_tiles(begin, begin + count, [&](int64_t tile, auto tile_rows) CEN_INLINE_LAMBDA {
    blocks.for_strips<R>([&](int64_t strip, auto n) CEN_INLINE_LAMBDA {
      MomentSums<R> of_tile{sums[strip].shift};
      prefetch_tile(unit, tile, strip, prefetch_distance, tile_rows);
      walk_rows<ActivationForm::identity>(
          tile + strip * kVecSize<R>, step, tile_rows,
          [&](int64_t at, int64_t) CEN_INLINE_LAMBDA { of_tile.add(load(unit + at, n) - of_tile.shift); });
      sums[strip].sum += of_tile.sum;
      sums[strip].squares += of_tile.squares;
    });
  });
  const double per_value = 1.0 / count;
  for (int64_t strip = 0; strip * kVecSize<R> < step; ++strip)
    for_wide_parts(
        [&](int64_t element, Vec<double> shift, Vec<double> sum, Vec<double> square) {
          const Vec<double> centered = square - sum * sum * per_value;
          store_row(mean + strip * kVecSize<R> + element, shift + sum * per_value);
          store_row(squares + strip * kVecSize<R> + element, centered < 0 ? Vec<double>{} : centered);
        },
        sums[strip].shift, sums[strip].sum, sums[strip].squares);
  bool finite = true;
  for (int64_t c = 0; c < step; ++c) finite &= is_finite(squares[c]);
  for (int64_t c = 0; !finite && c < step; ++c) {
    if (is_finite(squares[c])) continue;
    const Moments wide = wide_moments(count, [&](auto f) {
      for (int64_t row = begin; row < begin + count; ++row)
        f(load(unit + blocks.offset(row) + c, int64_t{1})[0]);
    });
    mean[c] = wide.mean;
    squares[c] = wide.squares;
  }
}

}  // namespace
}  // namespace cen::cpu
