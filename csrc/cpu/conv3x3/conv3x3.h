// 3x3 convolutions of stride 1 that preserve the image size, and their gradients, in float32 and channels
// last: the matrix products of winograd.h.
#pragma once

#include "winograd.h"

namespace cen::cpu {
namespace {

// The register tile of multiply(), kMR x kNR, is as large as the vector registers allow.
constexpr int64_t kNR = 2 * kFloats;
#if CEN_VECTOR_BYTES == 64
constexpr int64_t kMR = 8;
#else
constexpr int64_t kMR = 4;
#endif

// Weights are transformed in chunks of channels: multiples of kChunkMultiple, and of at most kChunkValues
// values unless that is less than kChunkMultiple.
constexpr int64_t kChunkMultiple = 128;
constexpr int64_t kChunkValues = 1 << 22;

struct Range {
  int64_t begin, end;
  constexpr int64_t size() const { return end - begin; }
};

// Calls f(range) for ranges of at most `most` channels that cover [0, channels).
template <class F>
void for_chunks(int64_t channels, int64_t most, F f) {
  for (int64_t begin = 0; begin < channels; begin += most) f(Range{begin, smaller(begin + most, channels)});
}
// The largest chunk of channels whose transformed weights (or weight gradients) with `others` channels stay
// in the last-level cache. It bounds scratch memory, too.
constexpr int64_t largest_chunk(int64_t others) {
  return larger(1, kChunkValues / (kPoints * others * kChunkMultiple)) * kChunkMultiple;
}

class Zeros : public Buffer<float> {
 public:
  explicit Zeros(int64_t size) : Buffer<float>(size) {
    for (int64_t i = 0; i < size; ++i) (*this)[i] = 0;
  }
};

// The GEMM microkernel: c[kMR][kNR] = (kAdd: +=) sum over r < terms of a[., r] b[r, .].
// Not inlined, because the caller's variables would compete with the sums for registers.
template <bool kAdd>
__attribute__((noinline)) void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                        int64_t terms, float* c, int64_t c_row) {
  Vec<float> sum[kMR][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kMR; ++i)
    for (int64_t j = 0; j < 2; ++j) sum[i][j] = kAdd ? load_row(c + i * c_row + j * kFloats) : Vec<float>{};
  for (int64_t r = 0; r < terms; ++r) {
    const auto left = load_row(b + r * kNR), right = load_row(b + r * kNR + kFloats);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kMR; ++i) {
      const auto factor = splat(a[i * a_row + r * a_step]);
      sum[i][0] += factor * left;
      sum[i][1] += factor * right;
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kMR; ++i)
    for (int64_t j = 0; j < 2; ++j) store_row(c + i * c_row + j * kFloats, sum[i][j]);
}

// Transforms weight [K, 3, 3, C] of a range of outputs to points [outputs / kNR][16][C][kNR].
inline void transform_kernels(const Convolution& p, Range outputs, const float* weight, float* points,
                              const Parallel& parallel) {
  const int64_t vectors = p.inputs / kFloats;
  parallel_ranges(parallel, outputs.size() / kNR * vectors, [&](int64_t begin, int64_t end) {
    const Buffer<float> transformed(kPoints * kNR * kFloats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / vectors, c = i % vectors * kFloats;
      for (int64_t k = 0; k < kNR; ++k) {
        const float* kernel = weight + (outputs.begin + panel * kNR + k) * 9 * p.inputs;
        const auto square = load_square<3>([&](int tap) { return kernel + tap * p.inputs; }, c);
        store_square([&](int point) { return transformed.get() + (point * kNR + k) * kFloats; }, 0,
                     both_ways(of_kernel, square));
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        float* to = points + ((panel * kPoints + point) * p.inputs + c) * kNR;
        const float* from = transformed.get() + point * kNR * kFloats;
        for (int64_t element = 0; element < kFloats; ++element)
          for (int64_t k = 0; k < kNR; ++k) to[element * kNR + k] = from[k * kFloats + element];
      }
    }
  });
}

// Transforms the weight of the convolution that yields the gradient of a range of inputs, i.e. rotated by 180
// degrees with inputs and outputs swapped, to points [inputs / kNR][16][K][kNR].
inline void transform_flipped_kernels(const Convolution& p, Range inputs, const float* weight, float* points,
                                      const Parallel& parallel) {
  parallel_tasks(parallel, p.outputs, [&](int64_t k) {
    const float* kernel = weight + k * 9 * p.inputs + inputs.begin;
    for (int64_t c = 0; c < inputs.size(); c += kFloats) {
      const auto square = load_square<3>([&](int tap) { return kernel + (8 - tap) * p.inputs; }, c);
      float* to = points + (c / kNR * kPoints * p.outputs + k) * kNR + c % kNR;
      store_square([&](int point) { return to + point * p.outputs * kNR; }, 0, both_ways(of_kernel, square));
    }
  });
}

// A thread's buffers for a block of tiles.
class Block {
 public:
  // most: tiles per block, a multiple of kMR.
  Block(const Convolution& p, int64_t most)
      : p_(p),
        tiles_(p),
        slice_(slice(p)),
        // Padded, because the 16 stores of a square a multiple of a page apart would share a cache set.
        value_step_(most * slice_ + kFloats),
        product_step_(most * kNR + kFloats),
        panels_(slice_ == p.inputs ? 1 : kChunkMultiple / kNR),
        zeros_(p.inputs),
        values_(kPoints * value_step_),
        products_(panels_ * kPoints * product_step_),
        sink_(kNR) {}

  // Inputs per call of multiply().
  static int64_t slice(const Convolution& p) { return p.inputs <= 512 ? p.inputs : 256; }
  // Outputs per pass over the tiles: only kChunkMultiple if partial sums are kept between slices of inputs.
  static int64_t chunk(const Convolution& p) {
    return slice(p) == p.inputs ? smaller(p.outputs, largest_chunk(p.inputs)) : kChunkMultiple;
  }

  // Computes a range of outputs for tiles [first, first + count).
  void convolve(Range outputs, const float* x, const float* kernels, const float* bias, float* y,
                int64_t first, int64_t count) const {
    for (int64_t c = 0; c < p_.inputs; c += slice_) {
      const int64_t channels = smaller(slice_, p_.inputs - c);
      transform_inputs(x, first, count, c, channels);
      for (int64_t k = 0; k < outputs.size(); k += kNR) {
        const float* factors = kernels + (k / kNR * kPoints * p_.inputs + c) * kNR;
        float* products = products_.get() + k / kNR % panels_ * kPoints * product_step_;
        if (c == 0)
          multiply_all<false>(factors, channels, products, count);
        else
          multiply_all<true>(factors, channels, products, count);
        if (c + channels == p_.inputs) write_outputs(products, bias, y, outputs.begin + k, first, count);
      }
    }
  }

 private:
  void transform_inputs(const float* x, int64_t first, int64_t count, int64_t channel,
                        int64_t channels) const {
    for (int64_t t = 0; t < count; ++t) {
      const float* pixels[16];
      tiles_.find<4, const float>(first + t, x, p_.inputs, zeros_.get(), pixels);
      for (int64_t c = 0; c < channels; c += kFloats)
        store_square([&](int point) { return values_.get() + point * value_step_ + t * slice_; }, c,
                     both_ways(of_input, load_square<4>([&](int i) { return pixels[i]; }, channel + c)));
    }
  }

  // kMR may round count up; products of the uninitialized rows past it are never written to y.
  template <bool kAdd>
  void multiply_all(const float* factors, int64_t channels, float* products, int64_t count) const {
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t t = 0; t < count; t += kMR)
        multiply<kAdd>(values_.get() + point * value_step_ + t * slice_, slice_, 1,
                       factors + point * p_.inputs * kNR, channels,
                       products + point * product_step_ + t * kNR, kNR);
  }

  void write_outputs(const float* products, const float* bias, float* y, int64_t k, int64_t first,
                     int64_t count) const {
    for (int64_t t = 0; t < count; ++t) {
      float* pixels[4];
      tiles_.find<2, float>(first + t, y + k, p_.outputs, sink_.get(), pixels);
      for (int64_t element = 0; element < kNR; element += kFloats) {
        auto square = both_ways(
            to_output,
            load_square<4>([&](int point) { return products + point * product_step_ + t * kNR; }, element));
        if (bias)
          for (auto& row : square.row)
            for (auto& value : row.at) value += load_row(bias + k + element);
        store_square([&](int i) { return pixels[i]; }, element, square);
      }
    }
  }

  const Convolution& p_;
  const Tiles tiles_;
  const int64_t slice_, value_step_, product_step_, panels_;
  const Zeros zeros_;
  const Buffer<float> values_;    // [points][tiles][slice]
  const Buffer<float> products_;  // [panels][points][tiles][kNR]; one panel if all inputs are one slice
  const Buffer<float> sink_;
};

// Computes y with the weights that transform(outputs, points) writes to points.
template <class F>
void convolve_by(const Convolution& p, const float* x, const float* bias, float* y, const Parallel& parallel,
                 F transform) {
  const int64_t tiles = Tiles(p).count(), chunk = Block::chunk(p);
  // The number of row groups (kMR tiles) per block whose transformed inputs fit in half of the L2 cache.
  constexpr int64_t kBytes = 1 << 19;
  const int64_t most = larger(1, kBytes / (sizeof(float) * kPoints * Block::slice(p) * kMR));
  const Buffer<float> kernels(kPoints * p.inputs * chunk);
  for_chunks(p.outputs, chunk, [&](Range outputs) {
    transform(outputs, kernels.get());
    parallel_ranges(parallel, divide_up(tiles, kMR), [&](int64_t begin, int64_t end) {
      const int64_t step = kMR * divide_up(end - begin, divide_up(end - begin, most));
      const Block block(p, step);
      const int64_t last = smaller(end * kMR, tiles);
      for (int64_t first = begin * kMR; first < last; first += step)
        block.convolve(outputs, x, kernels.get(), bias, y, first, smaller(step, last - first));
    });
  });
}

// x: [images, rows, columns, inputs]; weight: [outputs, 3, 3, inputs]; bias: [outputs] or null;
// y: [images, rows, columns, outputs].
inline void convolve(const Convolution& p, const float* x, const float* weight, const float* bias, float* y,
                     const Parallel& parallel) {
  convolve_by(p, x, bias, y, parallel,
              [&](Range outputs, float* points) { transform_kernels(p, outputs, weight, points, parallel); });
}

inline void convolve_backward(const Convolution& p, const float* dy, const float* weight, float* dx,
                              const Parallel& parallel) {
  Convolution flipped = p;
  flipped.inputs = p.outputs;
  flipped.outputs = p.inputs;
  convolve_by(flipped, dy, nullptr, dx, parallel, [&](Range inputs, float* points) {
    transform_flipped_kernels(p, inputs, weight, points, parallel);
  });
}

// Sums the transformed weight gradient over tiles, for one row of four points and a range of inputs:
// [4][K][inputs], with stride `width` between outputs. A row depends on half of a patch's pixels, so threads
// that divide the rows among them duplicate little work, and none waits for data in another's cache.
inline void sum_points(const Convolution& p, const float* dy, const float* x, int64_t row, Range inputs,
                       float* sums, int64_t width) {
  const Tiles tiles(p);
  // The number of tiles per block whose transforms stay in the L2 cache.
  constexpr int64_t kBytes = 1 << 20;
  const int64_t fitting = kBytes / (4 * sizeof(float) * (inputs.size() + p.outputs));
  const int64_t block = smaller(tiles.count(), smaller(larger(fitting, 64), 256));
  // [4][inputs / kNR][block][kNR] and [4][K / kFloats][block][kFloats], padded as in Block.
  const int64_t value_step = block * inputs.size() + kFloats, gradient_step = block * p.outputs + kFloats;
  const Buffer<float> values(4 * value_step), gradients(4 * gradient_step);
  const Zeros zeros(larger(p.inputs, p.outputs));
  for (int64_t first = 0; first < tiles.count(); first += block) {
    const int64_t count = smaller(block, tiles.count() - first);
    for (int64_t t = 0; t < count; ++t) {
      const float* about[16];
      tiles.find<4, const float>(first + t, x, p.inputs, zeros.get(), about);
      for (int64_t c = 0; c < inputs.size(); c += kFloats) {
        const auto line = of_input(kInputRows[row].of<4>(about, inputs.begin + c));
        float* to = values.get() + (c / kNR * block + t) * kNR + c % kNR;
        for (int i = 0; i < 4; ++i) store_row(to + i * value_step, line.at[i]);
      }
      const float* own[4];
      tiles.find<2, const float>(first + t, dy, p.outputs, zeros.get(), own);
      for (int64_t k = 0; k < p.outputs; k += kFloats) {
        const auto line = of_output_gradient(kGradientRows[row].of<2>(own, k));
        float* to = gradients.get() + (k / kFloats * block + t) * kFloats;
        for (int i = 0; i < 4; ++i) store_row(to + i * gradient_step, line.at[i]);
      }
    }
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t c = 0; c < inputs.size(); c += kNR)
        for (int64_t k = 0; k < p.outputs; k += kMR) {
          const float* a = gradients.get() + i * gradient_step + k / kFloats * block * kFloats + k % kFloats;
          const float* b = values.get() + i * value_step + c * block;
          float* sum = sums + (i * p.outputs + k) * width + c;
          if (first == 0)
            multiply<false>(a, 1, kFloats, b, count, sum, width);
          else
            multiply<true>(a, 1, kFloats, b, count, sum, width);
        }
  }
}

inline void convolve_weight_gradient(const Convolution& p, const float* dy, const float* x, float* dweight,
                                     const Parallel& parallel) {
  const int64_t chunk = smaller(p.inputs, smaller(largest_chunk(p.outputs), 512));
  const Buffer<float> sums(kPoints * p.outputs * chunk);
  for_chunks(p.inputs, chunk, [&](Range inputs) {
    const int64_t width = inputs.size(), panels = width / kNR;
    const int64_t parts = smaller(divide_up(parallel.threads, 4), panels);
    parallel_tasks(parallel, 4 * parts, [&](int64_t i) {
      const int64_t row = i / parts, part = i % parts;
      const int64_t begin = part * panels / parts * kNR, end = (part + 1) * panels / parts * kNR;
      sum_points(p, dy, x, row, {inputs.begin + begin, inputs.begin + end},
                 sums.get() + 4 * row * p.outputs * width + begin, width);
    });
    parallel_tasks(parallel, p.outputs, [&](int64_t k) {
      const float* from = sums.get() + k * width;
      float* to = dweight + k * 9 * p.inputs + inputs.begin;
      for (int64_t c = 0; c < width; c += kFloats)
        store_square([&](int tap) { return to + tap * p.inputs; }, c,
                     both_ways(to_kernel_gradient,
                               load_square<4>([&](int i) { return from + i * p.outputs * width; }, c)));
    });
  });
}

}  // namespace
}  // namespace cen::cpu
