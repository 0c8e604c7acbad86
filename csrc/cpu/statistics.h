// How x is cut into blocks, and the mean and variance of a channel from those of its blocks.
#pragma once

#include "line.h"

namespace cen::cpu {
namespace {

// Mean and centred sum of squares.
struct Moments {
  double mean, squares;
};

// From the sums of d and d * d, d = x - shift, over `count` values. Harmless as long as shift is one of the
// values: then (shift - mean)^2 <= squares, the loss is at most a factor `count` of double's rounding unit,
// and a constant channel gives exactly (shift, 0).
CEN_INLINE Moments moments_of(double shift, double sum, double sum_squares, int64_t count) {
  const double squares = sum_squares - sum * sum / count;
  return {shift + sum / count, squares < 0 ? 0 : squares};
}

// Joins the moments of blocks; block(b) gives those of block b, count(b) its number of values.
template <class Block, class Count>
CEN_INLINE Moments join(int64_t blocks, int64_t total, Block block, Count count) {
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

// Channels first: the lines of one channel, cut into blocks of whole lines, or of pieces of one line where
// lines are long.
struct LineBlocks {
  static constexpr int64_t kValues = 8192;  // a block; both passes over it stay in the first-level caches
  int64_t lines, size, stride;              // N lines of `size` values, `stride` apart
  int64_t lines_a_block, pieces, piece;
  int64_t count;

  explicit LineBlocks(const Problem& p) : lines(p.samples), size(p.spatial), stride(p.channels * p.spatial) {
    lines_a_block = larger(1, kValues / size);
    pieces = divide_up(size, kValues);
    piece = divide_up(divide_up(size, pieces), 64) * 64;
    pieces = divide_up(size, piece);
    count = divide_up(lines, lines_a_block) * pieces;
  }

  // f(offset, size) for each piece of memory in block b; offset from the channel's first value.
  template <class F>
  CEN_INLINE void for_lines(int64_t b, F f) const {
    const int64_t first = b / pieces * lines_a_block, begin = b % pieces * piece;
    const int64_t last = smaller(lines, first + lines_a_block);
    for (int64_t line = first; line < last; ++line) f(line * stride + begin, smaller(piece, size - begin));
  }

  int64_t values(int64_t b) const {
    const int64_t first = b / pieces * lines_a_block;
    return smaller(lines_a_block, lines - first) * smaller(piece, size - b % pieces * piece);
  }
};

template <class T>
Moments block_moments(const T* channel, const LineBlocks& blocks, int64_t b) {
  constexpr int64_t kUnroll = 4, kStep = kLanes<double>;
  Vec<double> sum[kUnroll] = {}, squares[kUnroll] = {};
  double shift = 0;
  bool first = true;
  blocks.for_lines(b, [&](int64_t offset, int64_t size) {
    const T* x = channel + offset;
    if (first) shift = x[0];
    first = false;
    int64_t i = 0;
    for (; i + kUnroll * kStep <= size; i += kUnroll * kStep)
      for (int64_t k = 0; k < kUnroll; ++k) {
        const Vec<double> d = load_wide(x + i + k * kStep) - shift;
        sum[k] += d;
        squares[k] += d * d;
      }
    for (; i < size; i += kStep) {
      const int64_t n = smaller(kStep, size - i);
      const Vec<double> d = first_lanes<double>(load_wide(x + i, n) - shift, n);
      sum[0] += d;
      squares[0] += d * d;
    }
  });
  return moments_of(shift, sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3])),
                    sum_lanes<double>((squares[0] + squares[1]) + (squares[2] + squares[3])),
                    blocks.values(b));
}

// Channels last: the N * spatial rows of C values of a modality, cut into blocks of rows.
struct RowBlocks {
  int64_t rows, channels, rows_a_block, count;

  explicit RowBlocks(const Problem& p) : rows(p.values()), channels(p.channels) {
    rows_a_block = larger(32, smaller(256, 32768 / channels));
    count = divide_up(rows, rows_a_block);
  }
  int64_t begin(int64_t b) const { return b * rows_a_block; }
  int64_t end(int64_t b) const { return smaller(rows, begin(b) + rows_a_block); }
  int64_t values(int64_t b) const { return end(b) - begin(b); }
};

// out[c] for the channels of one modality; sum and squares are scratch of `padded` doubles.
template <class T>
void block_moments(const T* modality, const RowBlocks& blocks, int64_t b, double* sum, double* squares,
                   int64_t padded, Moments* out) {
  constexpr int64_t kStep = kLanes<double>;
  std::memset(sum, 0, padded * sizeof(double));
  std::memset(squares, 0, padded * sizeof(double));
  const T* first = modality + blocks.begin(b) * blocks.channels;
  const auto add = [&](const T* row, auto rows) {
    for (int64_t i = 0; i < blocks.channels; i += kStep) {
      const int64_t n = smaller(kStep, blocks.channels - i);
      const bool whole = n == kStep;
      const Vec<double> shift = whole ? load_wide(first + i) : load_wide(first + i, n);
      Vec<double> s = load(sum + i), q = load(squares + i);
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = row + r * blocks.channels + i;
        const Vec<double> d = (whole ? load_wide(x) : load_wide(x, n)) - shift;
        s += d;
        q += d * d;
      }
      store(sum + i, s, AllLanes<double>{});
      store(squares + i, q, AllLanes<double>{});
    }
  };
  int64_t r = 0;
  const int64_t rows = blocks.values(b);
  for (; r + 4 <= rows; r += 4) add(first + r * blocks.channels, std::integral_constant<int64_t, 4>{});
  for (; r < rows; ++r) add(first + r * blocks.channels, std::integral_constant<int64_t, 1>{});
  for (int64_t c = 0; c < blocks.channels; ++c)
    out[c] = moments_of(static_cast<double>(first[c]), sum[c], squares[c], rows);
}

}  // namespace
}  // namespace cen::cpu
