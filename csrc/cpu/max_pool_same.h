// Max pooling of stride 1 in square windows, and its gradient; defined in cen_ext/ops/max_pool_same.
//
// In both memory layouts an image consists of rows of p.length values whose pixels are p.step values apart,
// so both are one case: a window has p.size rows of p.size values, p.step apart, and leaves the image where
// it leaves the row. `winners` holds the argmax within each window as one byte: its column in the low and its
// row in the high four bits, relative to the window's top left.
#pragma once

#include "vec.h"

namespace cen::cpu {
namespace {

template <class R>
using Winners = Vec<Bits<R>>;
template <class R>
using PackedWinners = typename VecOf<uint8_t, kVecSize<R>>::type;

// Conversion of winners, with intrinsics where compilers convert byte by byte.
template <class R>
CEN_INLINE Winners<R> unpack(PackedWinners<R> packed) {
#if CEN_VECTOR_BYTES == 64
  if constexpr (sizeof(R) == 4)
    return (Winners<R>)_mm512_cvtepu8_epi32((__m128i)packed);
  else
    return (Winners<R>)_mm512_cvtepu8_epi64(_mm_cvtsi64_si128((long long)packed));
#else
#if CEN_VECTOR_BYTES == 32
  if constexpr (sizeof(R) == 4) return (Winners<R>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)packed));
#endif
  return __builtin_convertvector(packed, Winners<R>);
#endif
}
template <class R>
CEN_INLINE PackedWinners<R> pack_winners(Winners<R> winners) {
#if CEN_VECTOR_BYTES == 64
  if constexpr (sizeof(R) == 4)
    return (PackedWinners<R>)_mm512_cvtepi32_epi8((__m512i)winners);
  else
    return (PackedWinners<R>)_mm_cvtsi128_si64(_mm512_cvtepi64_epi8((__m512i)winners));
#else
#if CEN_VECTOR_BYTES == 32
  if constexpr (sizeof(R) == 4) {
    const __m256i first_bytes = _mm256_shuffle_epi8((__m256i)winners, _mm256_set1_epi32(0x0c080400));
    const __m128i halves =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(first_bytes), _mm256_extracti128_si256(first_bytes, 1));
    return (PackedWinners<R>)_mm_cvtsi128_si64(halves);
  }
#endif
  return __builtin_convertvector(winners, PackedWinners<R>);
#endif
}

template <class R>
CEN_INLINE Winners<R> load_winners(const uint8_t* from, FullVec<R>) {
  PackedWinners<R> packed;
  std::memcpy(&packed, from, sizeof(packed));
  return unpack<R>(packed);
}
template <class R>
CEN_INLINE void store_winners(uint8_t* to, Winners<R> winners, FullVec<R>) {
  const auto packed = pack_winners<R>(winners);
  std::memcpy(to, &packed, sizeof(packed));
}
template <class R>
CEN_INLINE Winners<R> load_winners(const uint8_t* from, int64_t n) {
  uint8_t elements[kVecSize<R>] = {};
  for (int64_t element = 0; element < n; ++element) elements[element] = from[element];
  return load_winners<R>(elements, FullVec<R>{});
}
template <class R>
CEN_INLINE void store_winners(uint8_t* to, Winners<R> winners, int64_t n) {
  uint8_t elements[kVecSize<R>];
  store_winners<R>(elements, winners, FullVec<R>{});
  for (int64_t element = 0; element < n; ++element) to[element] = elements[element];
}

// Calls f(at, n) for the vectors that cover [0, values). n is FullVec, or the number of values in the last
// one.
template <class R, class F>
CEN_INLINE void for_vectors(int64_t values, F f) {
  int64_t at = 0;
  for (; at + kVecSize<R> <= values; at += kVecSize<R>) f(at, FullVec<R>{});
  if (at < values) f(at, values - at);
}

// A range [first, first + values) of columns, short enough that the rows of a window fit in the L2 cache.
struct Tile {
  int64_t first, values;

  template <class R>
  static int64_t most_values(const Pooling& p) {
    constexpr int64_t kBytes = 1 << 16;
    return divide_up(smaller(larger(kBytes / sizeof(R), 4 * p.halo()), p.length), kVecSize<R>) * kVecSize<R>;
  }
  template <class R>
  static int64_t count(const Pooling& p) {
    return divide_up(p.length, most_values<R>(p));
  }
  template <class R>
  static Tile number(const Pooling& p, int64_t i) {
    const int64_t most = most_values<R>(p);
    return {i * most, smaller(most, p.length - i * most)};
  }
};

// A running maximum and its index. As in torch.max_pool2d, NaN exceeds all numbers; of equal maxima the first
// wins, of several NaNs the last.
template <class R>
struct Maximum {
  Vec<R> value;
  Winners<R> winner;

  CEN_INLINE void meet(Vec<R> other, Winners<R> its_winner) {
    const auto better = (other > value) | (other != other);
    value = better ? other : value;
    winner = better ? its_winner : winner;
  }
};

// The forward pass over a tile. Keeps the horizontal maxima of the last p.size rows in a ring buffer and
// takes vertical maxima over them.
template <class T>
class MaximaOfRows {
  using R = Real<T>;

 public:
  explicit MaximaOfRows(const Pooling& p)
      : p_(p),
        width_(Tile::most_values<R>(p)),
        padded_(width_ + 2 * p.halo()),
        first_(divide_up(p.halo(), kVecSize<R>) * kVecSize<R>),
        maxima_(p.size * width_),
        winners_(p.size * width_) {
    for (int64_t at = 0; at < divide_up(p.halo(), kVecSize<R>) * kVecSize<R>; ++at)
      first_[at] = static_cast<Bits<R>>(larger(0, p.radius() - at / p.step));
  }

  // Computes the horizontal maxima of a row of image x.
  void add_row(const T* x, int64_t row, Tile tile) const {
    pad(x + row * p_.length, tile);
    R* maxima = maxima_.get() + slot(row);
    uint8_t* winners = winners_.get() + slot(row);
    for (int64_t at = 0; at < tile.values; at += kVecSize<R>) {
      // Starts at the first column inside the image, so that a window of -inf never selects padding.
      Maximum<R> best{splat(-static_cast<R>(INFINITY)), first_of_window(tile.first + at)};
      for (int64_t k = 0; k < p_.size; ++k)
        best.meet(load_row(padded_.get() + at + k * p_.step), splat(static_cast<Bits<R>>(k)));
      store_row(maxima + at, best.value);
      store_winners<R>(winners + at, best.winner, FullVec<R>{});
    }
  }

  // Writes a row of image y and of its winners.
  void write_row(T* y, uint8_t* winners, int64_t row, Tile tile, bool streamed) const {
    const int64_t top = row - p_.radius(), first = larger(0, -top), last = smaller(p_.size, p_.rows - top);
    const int64_t offset = row * p_.length + tile.first;
    for_vectors<R>(tile.values, [&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      const auto maximum = [&](int64_t k) CEN_INLINE_LAMBDA {
        const int64_t from = slot(top + k) + at;
        return Maximum<R>{
            load_row(maxima_.get() + from),
            load_winners<R>(winners_.get() + from, FullVec<R>{}) | static_cast<Bits<R>>(k << 4)};
      };
      Maximum<R> best = maximum(first);
      for (int64_t k = first + 1; k < last; ++k) {
        const Maximum<R> other = maximum(k);
        best.meet(other.value, other.winner);
      }
      store(y + offset + at, best.value, n, streamed);
      store_winners<R>(winners + offset + at, best.winner, n);
    });
  }

 private:
  CEN_INLINE int64_t slot(int64_t row) const { return row % p_.size * width_; }

  CEN_INLINE Winners<R> first_of_window(int64_t at) const {
    return at < p_.halo() ? load_row(first_.get() + at) : Winners<R>{};
  }

  // Copies the tile's part of a row and p.halo() values on both sides, -inf outside the image.
  void pad(const T* row, Tile tile) const {
    const int64_t begin = tile.first - p_.halo(), end = tile.first + tile.values + p_.halo();
    const int64_t first = larger(0, begin), last = smaller(p_.length, end);
    R* padded = padded_.get() - begin;
    for (int64_t at = begin; at < first; ++at) padded[at] = -static_cast<R>(INFINITY);
    for_vectors<R>(last - first, [&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      store_packed(padded + first + at, load(row + first + at, n), n);
    });
    for (int64_t at = last; at < end; ++at) padded[at] = -static_cast<R>(INFINITY);
  }

  const Pooling& p_;
  const int64_t width_;
  const Buffer<R> padded_;
  const Buffer<Bits<R>> first_;  // first column inside the image, for windows at the start of a row
  const Buffer<R> maxima_;       // [size, width]
  const Buffer<uint8_t> winners_;
};

template <class T>
void max_pool(const Pooling& p, const T* x, T* y, uint8_t* winners, const Parallel& parallel) {
  using R = Real<T>;
  const int64_t tiles = Tile::count<R>(p);
  // Few images are split into bands of rows. A band recomputes radius() rows of the bands next to it.
  const int64_t wanted = divide_up(4 * parallel.threads, p.images * tiles);
  const int64_t height = larger(divide_up(p.rows, wanted), smaller(4 * p.size, p.rows));
  const int64_t bands = divide_up(p.rows, height);
  const bool streamed = p.streaming_stores && p.length % kVecSize<R> == 0 && phase_of(y) == 0;
  parallel_ranges(parallel, p.images * bands * tiles, [&](int64_t begin, int64_t end) {
    const MaximaOfRows<T> maxima(p);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = Tile::number<R>(p, i % tiles);
      const int64_t image = i / tiles / bands * p.rows * p.length, first = i / tiles % bands * height;
      const int64_t last = smaller(first + height, p.rows);
      int64_t taken = larger(0, first - p.radius());
      for (int64_t row = first; row < last; ++row) {
        for (; taken < smaller(p.rows, row + p.radius() + 1); ++taken) maxima.add_row(x + image, taken, tile);
        maxima.write_row(y + image, winners + image, row, tile, streamed);
      }
    }
  });
}

// dx of a row, gathered instead of scattered: vertically, from the windows whose maximum is in this row, then
// horizontally.
template <class T>
class GradientsOfRows {
  using R = Real<T>;

 public:
  explicit GradientsOfRows(const Pooling& p)
      : p_(p),
        padded_(Tile::most_values<R>(p) + 2 * p.halo()),
        columns_(Tile::most_values<R>(p) + 2 * p.halo()) {}

  // Writes a row of image dx from images dy and winners.
  void write_row(const T* dy, const uint8_t* winners, T* dx, int64_t row, Tile tile, bool streamed) const {
    of_columns(dy, winners, row, tile);
    for_vectors<R>(tile.values, [&](int64_t at, auto n) CEN_INLINE_LAMBDA {
      Vec<R> sum{};
      for (int64_t k = p_.size - 1; k >= 0; --k) {
        const int64_t from = at + (p_.size - 1 - k) * p_.step;
        const auto won = load_winners<R>(columns_.get() + from, FullVec<R>{}) == static_cast<Bits<R>>(k);
        sum += won ? load_row(padded_.get() + from) : Vec<R>{};
      }
      store(dx + row * p_.length + tile.first + at, sum, n, streamed);
    });
  }

 private:
  // Sums dy vertically, for every horizontal window of this row.
  void of_columns(const T* dy, const uint8_t* winners, int64_t row, Tile tile) const {
    const int64_t begin = tile.first - p_.halo(), end = tile.first + tile.values + p_.halo();
    const int64_t first = larger(0, begin), last = smaller(p_.length, end);
    // This row has index k in the windows centered on row + radius - k.
    const int64_t lowest = larger(0, row + p_.radius() - p_.rows + 1);
    const int64_t highest = smaller(p_.size - 1, row + p_.radius());
    R* padded = padded_.get() - begin;
    uint8_t* columns = columns_.get() - begin;
    for (int64_t at = begin; at < first; ++at) padded[at] = 0;
    for_vectors<R>(last - first, [&](int64_t i, auto n) CEN_INLINE_LAMBDA {
      const int64_t at = first + i;
      Vec<R> sum{};
      Winners<R> column{};
      for (int64_t k = highest; k >= lowest; --k) {
        const int64_t from = (row + p_.radius() - k) * p_.length + at;
        const Winners<R> winner = load_winners<R>(winners + from, n);
        const auto won = (winner >> 4) == static_cast<Bits<R>>(k);
        sum += won ? load(dy + from, n) : Vec<R>{};
        column = won ? winner & 15 : column;
      }
      store_packed(padded + at, sum, n);
      store_winners<R>(columns + at, column, n);
    });
    for (int64_t at = last; at < end; ++at) padded[at] = 0;
  }

  const Pooling& p_;
  const Buffer<R> padded_;         // gradients of the horizontal maxima, 0 outside the image
  const Buffer<uint8_t> columns_;  // columns of these maxima within their windows
};

template <class T>
void max_pool_backward(const Pooling& p, const T* dy, const uint8_t* winners, T* dx,
                       const Parallel& parallel) {
  using R = Real<T>;
  const int64_t tiles = Tile::count<R>(p);
  const bool streamed = p.streaming_stores && p.length % kVecSize<R> == 0 && phase_of(dx) == 0;
  parallel_ranges(parallel, p.images * tiles * p.rows, [&](int64_t begin, int64_t end) {
    const GradientsOfRows<T> gradients(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / p.rows / tiles * p.rows * p.length;
      gradients.write_row(dy + image, winners + image, dx + image, i % p.rows,
                          Tile::number<R>(p, i / p.rows % tiles), streamed);
    }
  });
}

}  // namespace
}  // namespace cen::cpu
