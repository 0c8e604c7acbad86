// Winograd's minimal filtering F(2x2, 3x3): its transforms and tiles. Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016.
//
// y = A'[(G g G') * (B'd B)]A for a tile of 2x2 output pixels, where d is the 4x4 input patch around it, g
// the kernel, * the elementwise product and ' transposition. Summed over channels, the 16 points of the
// product are 16 matrix products with one row per tile, which take 16 multiplications per tile instead of 36.
// The gradient of x is the convolution with the kernel rotated by 180 degrees; that of the kernel is
// G'[(B'd B) * (A dy A')]G summed over tiles. The entries of A and B are 0 and +-1, of G 0, 1 and +-1/2.
//
// A dilated convolution is dilation^2 undilated ones, on the grids of pixels that are dilation apart.
#pragma once

#include "../vec.h"

namespace cen::cpu {
namespace {

constexpr int64_t kFloats = kVecSize<float>;
constexpr int64_t kPoints = 16;

// ---- transforms of a line; a square is transformed by columns, then by rows ----

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

// Loads or stores a square whose elements lie at at(i) + from.
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

// A row of B' or A, which combines two rows of pixels.
struct RowCombination {
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
constexpr RowCombination kInputRows[4] = {{0, 2, 1, -1}, {1, 2, 1, 1}, {2, 1, 1, -1}, {1, 3, 1, -1}};
constexpr RowCombination kGradientRows[4] = {{0, 1, 1, 0}, {0, 1, 1, 1}, {0, 1, 1, -1}, {0, 1, 0, -1}};

// ---- tiles ----

// The tiles of 2x2 output pixels of all images.
class Tiles {
 public:
  explicit Tiles(const Convolution& p)
      : p_(p),
        down_(divide_up(divide_up(p.rows, p.dilation), 2)),
        across_(divide_up(divide_up(p.columns, p.dilation), 2)) {}

  int64_t count() const { return p_.images * p_.dilation * p_.dilation * down_ * across_; }

  // Points `pixels` to the tile's 2x2 pixels (n = 2) or its 4x4 patch (n = 4) in images [N, H, W, channels],
  // and to `outside` where they are outside the image.
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
