// The rows of x, for channels last: the order in which they are read, and how results are stored.
#pragma once

#include "exchange.h"

namespace cen::cpu {
namespace {

// The same value, of which compilers know nothing: else they make a variable of every sum that it is in, for
// each of the loop's addresses, and have no registers for so many.
CEN_INLINE int64_t opaque(int64_t value) {
  asm("" : "+r"(value));
  return value;
}

// Blocks of the rows (C values of one pixel) of a unit, for channels last. The rows lie in runs without gaps:
// one run is the whole unit or, where rows of the other modalities lie between, a sample. A block is
// processed in tiles of kTile rows, strip by strip, so that memory is read nearly in order.
struct RowBlocks {
  // Small, because rows a power of two apart share few sets of the L1 cache, which must hold one strip of a
  // tile and of the next: 512 channels took five times as long with 64 rows as with 8.
  static constexpr int64_t kTile = 4;
  static constexpr int64_t kPartBytes = 1 << 16;  // that a part reads, of all tensors and modalities

  int64_t rows, channels, run, run_stride;  // `run` rows in a run, and values from one run to the next
  int64_t rows_per_block, count;

  // most: the largest number of rows per block. Fewer rows keep float sums accurate, more cost less to
  // combine.
  RowBlocks(const Problem& p, int64_t most)
      : rows(p.values()),
        channels(p.channels),
        run(p.sample_stride() == p.row_size() ? rows : p.spatial),
        run_stride(p.sample_stride()) {
    rows_per_block = larger(32, smaller(most, 65536 / channels));
    count = divide_up(rows, rows_per_block);
  }
  int64_t begin(int64_t b) const { return b * rows_per_block; }
  int64_t end(int64_t b) const { return smaller(rows, begin(b) + rows_per_block); }
  int64_t values(int64_t b) const { return end(b) - begin(b); }

  // The offset of a row from the unit's first value.
  CEN_INLINE int64_t offset(int64_t row) const { return row / run * run_stride + row % run * channels; }

  // The prefetch distance in values, to a later tile: hardware prefetchers miss reads with the stride of a
  // row.
  int64_t prefetch_distance(int64_t bytes_per_value) const {
    return larger(kTile, 8192 / (channels * bytes_per_value)) * channels;
  }

  // The number of rows in a part of a block, where `bytes` are read for each value of a unit. The L2 cache
  // holds two parts: the one in which modalities read each other's values, and the next.
  int64_t part(int64_t bytes) const { return larger(2 * kTile, kPartBytes / (bytes * channels)); }

  // Calls f(begin, end) for the parts of block b. They end where tiles do, so that sums do not depend on
  // them.
  template <class F>
  CEN_INLINE void for_parts(int64_t b, int64_t part, F f) const {
    const int64_t stop = end(b);
    for (int64_t row = begin(b); row < stop;) {
      const int64_t target = row + part, first = larger(begin(b), target / run * run);
      const int64_t part_end = target >= stop ? stop : first + (target - first) / kTile * kTile;
      f(row, part_end);
      row = part_end;
    }
  }

  // The same in reverse order, for what has no sums.
  template <class F>
  CEN_INLINE void for_parts_reversed(int64_t b, int64_t part, F f) const {
    const int64_t start = begin(b);
    for (int64_t stop = end(b); stop > start;) {
      const int64_t row = larger(start, stop - part);
      f(row, stop);
      stop = row;
    }
  }

  // Calls f(at, count) for the tiles of rows [row, stop), which begin at the offset `at` from the unit's
  // first value and lie in one run each. count is a compile-time constant.
  template <class F>
  CEN_INLINE void for_tiles(int64_t row, int64_t stop, F f) const {
    const int64_t step = channels;
    while (row < stop) {
      const int64_t run_stop = smaller(stop, (row / run + 1) * run);
      int64_t at = offset(row);
      for (; row + kTile <= run_stop; row += kTile, at += kTile * step)
        f(at, std::integral_constant<int64_t, kTile>{});
      for (; row < run_stop; ++row, at += step) f(at, std::integral_constant<int64_t, 1>{});
    }
  }

  // Calls f(strip, n) for the strips of one vector of channels. n is FullVec, or the width of the last one.
  template <class R, class F>
  CEN_INLINE void for_strips(F f) const {
    const int64_t whole = channels / kVecSize<R>, left = channels % kVecSize<R>;
    for (int64_t strip = 0; strip < whole; ++strip) f(opaque(strip), FullVec<R>{});
    if (left) f(whole, left);
  }
};

// Prefetches the share of a strip in the tile that is `distance` values ahead, in the order of memory. tile
// is the offset of a tile of kRows rows. `from` may be null.
template <class T, int64_t kRows>
CEN_INLINE void prefetch_tile(const T* from, int64_t tile, int64_t strip, int64_t distance,
                              std::integral_constant<int64_t, kRows>) {
  constexpr int64_t kShare = kRows * kVecSize<Real<T>>, kLine = 64 / sizeof(T);
  if (!from) return;
#pragma GCC unroll 16
  for (int64_t at = 0; at < kShare; at += kLine)
    __builtin_prefetch(from + (tile + distance + strip * kShare + at), 0, 2);
}

// The same in all tensors that are read.
template <class T, class Rows>
CEN_INLINE void prefetch_tile(const GroupInputs<T>& group, int64_t tile, int64_t strip, int64_t distance,
                              Rows rows) {
  prefetch_tile(group.x, tile, strip, distance, rows);
  prefetch_tile(group.residual, tile, strip, distance, rows);
  prefetch_tile(group.dy, tile, strip, distance, rows);
}

// Calls f(tile, strip, n, rows) for the strips of the tiles of rows [begin, end), and prefetches what lies
// `distance` values ahead of each. `tile` is the offset of a tile in the tensors, first that of the unit; n
// is as in for_strips() and rows as in for_tiles().
template <class T, class F>
CEN_INLINE void for_strips_of_rows(const GroupInputs<T>& group, const RowBlocks& blocks, int64_t first,
                                   int64_t begin, int64_t end, int64_t distance, F f) {
  blocks.for_tiles(begin, end, [&](int64_t at, auto rows) CEN_INLINE_LAMBDA {
    const int64_t tile = first + at;
    blocks.template for_strips<Real<T>>([&](int64_t strip, auto n) CEN_INLINE_LAMBDA {
      prefetch_tile(group, tile, strip, distance, rows);
      f(tile, strip, n, rows);
    });
  });
}

// Calls f(at, r) for the vectors of a strip in the rows of a tile, the first of them at offset `first`. The
// form of all activations is so large that it is not repeated for every row: half of the time to compile.
template <ActivationForm kForm, int64_t kRows, class F>
CEN_INLINE void walk_rows(int64_t first, int64_t step, std::integral_constant<int64_t, kRows>, F f) {
  if constexpr (kForm == ActivationForm::any) {
#pragma GCC unroll 1
    for (int64_t r = 0; r < kRows; ++r) f(first + r * step, r);
  } else {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) f(first + r * step, r);
  }
}

// Results of a tile, kept until a piece of each of its rows can be stored as a whole. Non-temporal stores are
// slow unless those of a cache line follow each other, and a read waits for stores before it whose address
// has the same offset in its page, as rows have whose size is a power of two.
template <class R>
class TileResults {
 public:
  CEN_INLINE void put(int64_t row, int64_t strip, Vec<R> result) { of_[row][slot(strip)] = result; }

  // Stores what is complete once that of `strip` is here, for a tile at the offset `tile` with rows `step`
  // apart.
  template <class T, class Rows, class N>
  CEN_INLINE void store(T* to, int64_t tile, int64_t step, int64_t strip, Rows, N n, bool streamed) const {
    const int64_t last = slot(strip), at = tile + (strip - last) * kVecSize<R>;
    if constexpr (!std::is_same_v<N, FullVec<R>>) {
      for (int64_t r = 0; r < Rows::value; ++r)
        cpu::store(to + (at + r * step + last * kVecSize<R>), of_[r][last], n, false);
    } else if (last == kStrips - 1) {
      store_pieces<Rows>(to, at, step, std::integral_constant<int64_t, kStrips>{}, streamed);
    } else if ((strip + 2) * kVecSize<R> > step) {
      store_pieces<Rows>(to, at, step, last + 1, streamed);
    }
  }

 private:
  static constexpr int64_t kStrips = 8;
  static CEN_INLINE int64_t slot(int64_t strip) { return static_cast<uint64_t>(strip) % kStrips; }

  template <class Rows, class T, class Count>
  CEN_INLINE void store_pieces(T* to, int64_t at, int64_t step, Count count, bool streamed) const {
    constexpr FullVec<R> all;
    const auto put = [&](bool streamed) CEN_INLINE_LAMBDA {
#pragma GCC unroll 1
      for (int64_t row = 0; row < Rows::value; ++row) {
        // Or compilers load all rows before they store the first, and spill them.
        const int64_t r = opaque(row);
        for (int64_t s = 0; s < count; ++s)
          cpu::store(to + (at + r * step + s * all), of_[r][s], all, streamed);
      }
    };
    if (streamed)
      put(true);
    else
      put(false);
  }

  Vec<R> of_[RowBlocks::kTile][kStrips];
};

// Partial results per block, unit and channel: doubles [blocks, units, padded channels].
class BlockRows {
 public:
  BlockRows(int64_t blocks, int64_t units, int64_t padded)
      : units_(units), padded_(padded), values_(blocks * units * padded) {}

  CEN_INLINE double* row(int64_t b, int64_t unit) const {
    return values_.get() + (b * units_ + unit) * padded_;
  }

 private:
  int64_t units_, padded_;
  Buffer<double> values_;
};

}  // namespace
}  // namespace cen::cpu
