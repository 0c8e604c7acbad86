// Mean and variance of channels: over the values of a thread, of a block, and of all chunks.
//
// E[x^2] - E[x]^2 would cancel. Instead a thread sums deviations from the mean of its first values, and
// moments are combined by Chan's formula with weights, so that no square exceeds the scale of the resulting
// variance. Means are combined in double, because float would lose the differences between large means.
#pragma once

#include "geometry.cuh"

namespace cen::cuda {

template <class A, int n>
struct Moments {
  Array<double, n> mean;
  Array<A, n> var;
  A count;
};

template <class A>
CEN_DEVICE bool is_finite(A v) {
  return v - v == 0;
}

// Moments from the sums of d and d * d, where d = x - shift.
template <class A, int n>
CEN_DEVICE Moments<A, n> moments_of(const Array<A, n>& shift, const Array<A, n>& sum,
                                    const Array<A, n>& squares, int count) {
  Moments<A, n> m{};
  m.count = A(count);
  if (count == 0) return m;
  CEN_UNROLL
  for (int l = 0; l < n; ++l) {
    const A mean = sum.element[l] / m.count, var = (squares.element[l] - sum.element[l] * mean) / m.count;
    m.mean.element[l] = double(shift.element[l]) + double(mean);
    m.var.element[l] = var < 0 ? A(0) : var;
  }
  return m;
}

// The moments of a thread's values, as vectors that read(step, slice) returns.
template <class T, bool kLast, class Read>
CEN_DEVICE Moments<Real<T>, kLast ? kVecSize<T> : 1> thread_moments(const Problem& p, const Geometry& geo,
                                                                    const ThreadCoord<kLast>& coord,
                                                                    Read read) {
  using A = Real<T>;
  constexpr int kBatch = kLast && sizeof(T) == 2 ? 2 : 4;  // vectors in flight; more do not fit in registers
  constexpr int n = kLast ? kVecSize<T> : 1;
  Array<A, n> shift{}, sum{}, squares{};
  int count = 0;
  const int steps = coord.steps(geo);
  for (int step = 0; step < steps; step += kBatch) {
    Vec<T> vectors[kBatch];
    VectorSlice slices[kBatch];
    CEN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      slices[b] = coord.slice(p, geo, step + b);
      if (!slices[b].empty()) vectors[b] = read(step + b, slices[b]);
    }
    CEN_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (slices[b].empty()) continue;
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) {
        const A x = to_real(vectors[b].element[l]);
        const int s = kLast ? l : 0;
        if (count == 0 && (kLast || l == slices[b].begin)) shift.element[s] = x;
        const A d = slices[b].has(l) ? x - shift.element[s] : A(0);
        sum.element[s] += d;
        squares.element[s] += d * d;
      }
      count += kLast ? 1 : slices[b].end - slices[b].begin;
    }
    if (step > 0 || count == 0) continue;
    // Moves the shift from the first value to the mean of the first vectors: with an outlier as shift, the
    // sums would lose their low bits.
    CEN_UNROLL
    for (int s = 0; s < n; ++s) {
      const A moved = shift.element[s] + sum.element[s] / A(count) - shift.element[s];
      squares.element[s] -= moved * (2 * sum.element[s] - A(count) * moved);
      sum.element[s] -= A(count) * moved;
      shift.element[s] += moved;
    }
  }
  return moments_of(shift, sum, squares, count);
}

// Tree reduction over the threads of each line in shared memory [values][threads], with a float or double per
// value.
template <class A, bool kLast>
struct Tree {
  A* memory;
  const ThreadCoord<kLast>& coord;

  CEN_DEVICE A& at(int value, int ranks_on) const {
    const int to_next = kLast ? coord.lines : 1;
    return memory[value * coord.num_threads + coord.thread_rank + ranks_on * to_next];
  }

  // join(step) combines the values of the thread `step` ranks on with those of this one. Ends with a barrier;
  // rank 0 of each line then has the result.
  template <class Join>
  CEN_DEVICE void run(Join join) const {
    int step = 1;
    while (2 * step < coord.line_threads) step *= 2;
    sync_threads();
    for (; step > 0; step /= 2) {
      if (coord.line_rank < step && coord.line_rank + step < coord.line_threads) join(step);
      sync_threads();
    }
  }
};

// Combines the moments of the threads of a line; rank 0 gets the result.
template <class A, int n, bool kLast>
CEN_DEVICE Moments<A, n> join_line(void* workspace, const ThreadCoord<kLast>& coord, Moments<A, n> mine) {
  const Tree<double, kLast> means{static_cast<double*>(workspace), coord};
  const Tree<A, kLast> tree{reinterpret_cast<A*>(means.memory + n * coord.num_threads), coord};
  const auto keep = [&] {
    CEN_UNROLL
    for (int l = 0; l < n; ++l) {
      means.at(l, 0) = mine.mean.element[l];
      tree.at(l, 0) = mine.var.element[l];
    }
    tree.at(n, 0) = mine.count;
  };
  keep();
  tree.run([&](int step) {
    const A other = tree.at(n, step), count = mine.count + other;
    if (other == 0) return;
    const A own_part = mine.count / count, other_part = other / count;
    CEN_UNROLL
    for (int l = 0; l < n; ++l) {
      const A d = A(means.at(l, step) - mine.mean.element[l]);
      mine.var.element[l] =
          mine.var.element[l] * own_part + tree.at(l, step) * other_part + (d * own_part) * (d * other_part);
      mine.mean.element[l] += double(d * other_part);
    }
    mine.count = count;
    keep();
  });
  return mine;
}

// Recomputes in double, one channel at a time, the moments of channels whose squares overflow float or that
// have NaN. This is rare, so it saves registers rather than time.
template <class T, bool kLast, class Read>
CEN_DEVICE void wide_moments(const Problem& p, const Geometry& geo, const ThreadCoord<kLast>& coord,
                             void* workspace, double* mean, double* var, Read read) {
  constexpr int n = kLast ? kVecSize<T> : 1;
  const int steps = coord.steps(geo);
  CEN_UNROLL_1
  for (int channel = 0; channel < n; ++channel) {
    double shift = 0, sum = 0, squares = 0;
    int count = 0;
    CEN_UNROLL_1
    for (int step = 0; step < steps; ++step) {
      const VectorSlice slice = coord.slice(p, geo, step);
      if (slice.empty()) continue;
      const Vec<T> vec = read(step, slice);
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) {
        if (!slice.has(l) || (kLast && l != channel)) continue;
        const double x = to_real(vec.element[l]);
        if (count++ == 0) shift = x;
        sum += x - shift;
        squares += (x - shift) * (x - shift);
      }
    }
    const Moments<double, 1> m =
        join_line(workspace, coord, moments_of<double, 1>({{shift}}, {{sum}}, {{squares}}, count));
    const int w = coord.line * n + channel;
    if (coord.line_rank != 0 || is_finite(var[w])) continue;
    mean[w] = m.mean.element[0];
    var[w] = m.var.element[0];
  }
  sync_threads();
}

// Bytes of workspace per thread in block_moments().
template <class T>
constexpr int64_t moments_workspace(bool channels_last) {
  const int64_t n = channels_last ? kVecSize<T> : 1;
  const int64_t all = n * sizeof(double) + (n + 1) * sizeof(Real<T>), wide = 3 * sizeof(double);
  return all > wide ? all : wide;
}

// Writes the moments of the block's values per channel to mean and var in shared memory. *overflow, also in
// shared memory, must be 0 before.
template <class T, bool kLast, class Read>
CEN_DEVICE void block_moments(const Problem& p, const Geometry& geo, const ThreadCoord<kLast>& coord,
                              void* workspace, int* overflow, double* mean, double* var, Read read) {
  using R = Real<T>;
  constexpr int n = kLast ? kVecSize<T> : 1;
  const Moments<R, n> m = join_line(workspace, coord, thread_moments<T>(p, geo, coord, read));
  if (coord.line_rank == 0) {
    bool finite = true;
    for (int l = 0; l < n; ++l) {
      mean[coord.line * n + l] = m.mean.element[l];
      var[coord.line * n + l] = m.var.element[l];
      finite &= is_finite(m.var.element[l]);
    }
    if (!finite) *overflow = 1;
  }
  sync_threads();
  if constexpr (sizeof(R) == sizeof(float))
    if (*overflow) wide_moments<T>(p, geo, coord, workspace, mean, var, read);
}

struct MeanVar {
  double mean, var;
};

// Weighted sums over chunks that yield the moments of the whole channel, or over channels that of those which
// are joined. The mean of one part serves as shift, so that the final cancellation is limited to the variance
// between parts.
struct ChunkSums {
  double shift, mean = 0, square = 0;

  CEN_DEVICE void add(double part, const MeanVar& moments) {
    const double d = moments.mean - shift;
    mean += part * d;
    square += part * (moments.var + d * d);
  }

  // Adds the chunks first, first + step, …; of_chunk(k) returns the moments of chunk k.
  template <bool kLast, class OfChunk>
  CEN_DEVICE void add(const Problem& p, const Geometry& geo, int64_t channel, int64_t first, int64_t step,
                      OfChunk of_chunk) {
    CEN_UNROLL_4
    for (int64_t k = first; k < geo.chunks; k += step) {
      const int64_t end = (k + 1) * geo.chunk < geo.slices ? (k + 1) * geo.chunk : geo.slices;
      const int64_t values =
          values_before<kLast>(p, geo, channel, end) - values_before<kLast>(p, geo, channel, k * geo.chunk);
      add(double(values) / double(p.values()), of_chunk(k));
    }
  }

  CEN_DEVICE MeanVar joined() const {
    const double var = square - mean * mean;
    return {shift + mean, var < 0 ? 0 : var};
  }
};

template <bool kLast, class OfChunk>
CEN_DEVICE MeanVar join_chunks(const Problem& p, const Geometry& geo, int64_t channel, OfChunk of_chunk) {
  if (geo.chunks == 1) return of_chunk(0);
  ChunkSums sums{of_chunk(0).mean};
  sums.add<kLast>(p, geo, channel, 0, 1, of_chunk);
  return sums.joined();
}

// The moments of channels that share statistics; of_channel(i) returns those of the i-th.
template <class OfChannel>
CEN_DEVICE MeanVar join_channels(int64_t channels, OfChannel of_channel) {
  ChunkSums sums{of_channel(0).mean};
  CEN_UNROLL_4
  for (int64_t i = 0; i < channels; ++i) sums.add(1 / double(channels), of_channel(i));
  return sums.joined();
}

}  // namespace cen::cuda
