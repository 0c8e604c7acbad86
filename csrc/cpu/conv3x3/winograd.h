// Winograd's minimal filtering F(2x2, 3x3): its transformations, and the tiles that they are of. Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
//
// y = A'[(G g G') * (B'd B)]A for a tile of 2x2 places: d are the 4x4 places of x about it, g the kernel, *
// the product of each of 16 points, ' a transposition. Over channels the points are 16 matrix products of a
// row a tile, with 16 multiplications where nine times four were. The gradients are the same sums the other
// way round: of x the convolution by the turned kernel, of the kernel G'[(B'd B) * (A dy A')]G, summed over
// tiles. All factors of B and A are 0, 1 and -1, those of G 1 and 1/2.
//
// A dilated convolution is one of its own on each of the dilation^2 grids of places that far apart.
#pragma once

#include "../vec.h"

namespace cen::cpu {
namespace {

constexpr int64_t kFloats = kVecSize<float>;
constexpr int64_t kPoints = 16;

// ---- the transformations, of one line; a square's are those of its columns, then of its rows ----

template <int n>
struct Line {
  Vec<float> at[n];
};
template <int n>
struct Square {
  Line<n> row[n];
};

CEN_INLINE Line<4> of_input(const Line<4>& d) {  // B'
  return {{d.at[0] - d.at[2], d.at[1] + d.at[2], d.at[2] - d.at[1], d.at[1] - d.at[3]}};
}
CEN_INLINE Line<2> to_output(const Line<4>& m) {  // A'
  return {{m.at[0] + m.at[1] + m.at[2], m.at[1] - m.at[2] - m.at[3]}};
}
CEN_INLINE Line<4> of_output_gradient(const Line<2>& y) {  // A
  return {{y.at[0], y.at[0] + y.at[1], y.at[0] - y.at[1], -y.at[1]}};
}
CEN_INLINE Line<4> of_kernel(const Line<3>& g) {  // G
  const auto outer = g.at[0] + g.at[2];
  return {{g.at[0], (outer + g.at[1]) * 0.5f, (outer - g.at[1]) * 0.5f, g.at[2]}};
}
CEN_INLINE Line<3> to_kernel_gradient(const Line<4>& u) {  // G'
  const auto half = (u.at[1] + u.at[2]) * 0.5f;
  return {{u.at[0] + half, (u.at[1] - u.at[2]) * 0.5f, half + u.at[3]}};
}

template <int kTo, int kFrom>
CEN_INLINE Square<kTo> both_ways(Line<kTo> (*map)(const Line<kFrom>&), const Square<kFrom>& from) {
  Line<kTo> columns[kFrom];
  for (int j = 0; j < kFrom; ++j) {
    Line<kFrom> column;
    for (int i = 0; i < kFrom; ++i) column.at[i] = from.row[i].at[j];
    columns[j] = map(column);
  }
  Square<kTo> to;
  for (int i = 0; i < kTo; ++i) {
    Line<kFrom> row;
    for (int j = 0; j < kFrom; ++j) row.at[j] = columns[j].at[i];
    to.row[i] = map(row);
  }
  return to;
}

// Squares whose places are pointers, `from` values on.
template <int n, class Pointer>
CEN_INLINE Square<n> load_square(Pointer at, int64_t from) {
  Square<n> square;
#pragma GCC unroll 16
  for (int i = 0; i < n * n; ++i) square.row[i / n].at[i % n] = load_row(at(i) + from);
  return square;
}
template <int n, class Pointer>
CEN_INLINE void store_square(Pointer at, int64_t from, const Square<n>& square) {
#pragma GCC unroll 16
  for (int i = 0; i < n * n; ++i) store_row(at(i) + from, square.row[i / n].at[i % n]);
}

// A row of B' or A: what it makes of two rows of places.
struct Mix {
  int first, second;
  float of_first, of_second;

  template <int n>
  CEN_INLINE Line<n> of(const float* const* pixels, int64_t channel) const {
    Line<n> line;
    for (int j = 0; j < n; ++j)
      line.at[j] = load_row(pixels[first * n + j] + channel) * of_first +
                   load_row(pixels[second * n + j] + channel) * of_second;
    return line;
  }
};
constexpr Mix kInputRows[4] = {{0, 2, 1, -1}, {1, 2, 1, 1}, {2, 1, 1, -1}, {1, 3, 1, -1}};
constexpr Mix kGradientRows[4] = {{0, 1, 1, 0}, {0, 1, 1, 1}, {0, 1, 1, -1}, {0, 1, 0, -1}};

// ---- where things lie ----

// The tiles of 2x2 places of all images, and their pixels.
class Tiles {
 public:
  explicit Tiles(const Convolution& p)
      : p_(p),
        down_(divide_up(divide_up(p.rows, p.dilation), 2)),
        across_(divide_up(divide_up(p.columns, p.dilation), 2)) {}

  int64_t count() const { return p_.images * p_.dilation * p_.dilation * down_ * across_; }

  // The n x n pixels about (n = 4) or of (n = 2) a tile in images of so many channels; outside for all that
  // are in no image.
  template <int n, class T>
  void find(int64_t tile, T* images, int64_t channels, T* outside, T* (&pixels)[n * n]) const {
    const int64_t d = p_.dilation;
    const int64_t across = tile % across_, down = tile / across_ % down_;
    const int64_t grid = tile / (across_ * down_) % (d * d), image = tile / (across_ * down_ * d * d);
    const int64_t row = grid / d + d * (2 * down - (n == 4)), column = grid % d + d * (2 * across - (n == 4));
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        const int64_t r = row + i * d, c = column + j * d;
        const bool inside = 0 <= r && r < p_.rows && 0 <= c && c < p_.columns;
        pixels[i * n + j] = inside ? images + ((image * p_.rows + r) * p_.columns + c) * channels : outside;
      }
  }

 private:
  const Convolution& p_;
  const int64_t down_, across_;
};

}  // namespace
}  // namespace cen::cpu
