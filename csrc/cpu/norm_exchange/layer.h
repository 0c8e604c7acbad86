// Layer norm: every position is normalized over its channels, in all modalities together. Channels last, a
// position's rows stay in the L1 cache from the statistics to the results; channels first, those of a tile of
// neighboring positions stay in the L2 cache. So memory is read once.
#pragma once

#include "backward.h"
#include "together.h"

namespace cen::cpu {
namespace {

// The problem with all positions of a modality in one unit: what differs between positions are only the
// statistics, [M, positions], which no table of coefficients has.
inline Problem of_positions(Problem p) {
  p.samples *= p.groups;
  p.groups = 1;
  return p;
}

// Tables with weight and bias as scale and offset.
template <class R>
void set_weights(const Problem& p, const R* weight, const R* bias, const Tables<R>& tables) {
  for (int64_t m = 0; m < p.modalities; ++m)
    for (int64_t c = 0; c < p.channels; ++c) {
      tables.at(m, c).scale[c % kVecSize<R>] = weight[m * p.channels + c];
      tables.at(m, c).offset[c % kVecSize<R>] = bias[m * p.channels + c];
    }
}

// The mean of a vector of positions and 1 / sqrt(var + eps), `vectors` of them in every modality.
template <class R>
class PositionStatistics {
 public:
  PositionStatistics(int64_t modalities, int64_t vectors)
      : vectors_(vectors), mean_(modalities * vectors), invstd_(modalities * vectors) {}

  CEN_INLINE void set(int64_t m, int64_t v, Vec<R> mean, Vec<R> var, double eps) const {
    Vec<R> root = var + static_cast<R>(eps);
    for (int64_t element = 0; element < kVecSize<R>; ++element) root[element] = std::sqrt(root[element]);
    mean_[m * vectors_ + v] = mean;
    invstd_[m * vectors_ + v] = 1 / root;
  }
  CEN_INLINE const Vec<R>& mean(int64_t m, int64_t v = 0) const { return mean_[m * vectors_ + v]; }
  CEN_INLINE const Vec<R>& invstd(int64_t m, int64_t v = 0) const { return invstd_[m * vectors_ + v]; }

 private:
  const int64_t vectors_;
  const Buffer<Vec<R>> mean_, invstd_;
};

// What Together asks of the participants: a vector of channels at one position, for channels last. `first`
// are the coefficients of the first participant, which is modality first_m; `position` is the element of the
// position in the vectors of statistics.
template <class R>
class PositionChannels {
 public:
  CEN_INLINE PositionChannels(const Coefficients<R>* first, int64_t row_stride,
                              const PositionStatistics<R>& statistics, int64_t first_m, int64_t position)
      : first_(first),
        row_stride_(row_stride),
        statistics_(statistics),
        first_m_(first_m),
        position_(position) {}

  CEN_INLINE Vec<R> weight(int64_t m) const { return load_row(at(m).scale); }
  CEN_INLINE Vec<R> invstd(int64_t m) const { return splat(statistics_.invstd(first_m_ + m)[position_]); }
  CEN_INLINE Vec<R> centered(int64_t m, Vec<R> x) const {
    return x - splat(statistics_.mean(first_m_ + m)[position_]);
  }
  CEN_INLINE Vec<R> z(int64_t m, Vec<R> x) const {
    return centered(m, x) * (weight(m) * invstd(m)) + load_row(at(m).offset);
  }
  CEN_INLINE Vec<Bits<R>> replaced(int64_t m) const { return load_sources<R>(at(m).replaced); }

 private:
  CEN_INLINE const Coefficients<R>& at(int64_t m) const { return first_[m * row_stride_]; }

  const Coefficients<R>* const first_;
  const int64_t row_stride_;
  const PositionStatistics<R>& statistics_;
  const int64_t first_m_, position_;
};

// Up to a vector's number of elements, known at run time.
struct Some {
  int64_t count;
};
template <class T>
CEN_INLINE Packed<T> load_packed(const T* from, Some n) {
  return n.count == kVecSize<Real<T>> ? load_packed(from, FullVec<Real<T>>{}) : load_packed(from, n.count);
}
template <class T>
CEN_INLINE void store(T* to, Vec<Real<T>> v, Some n, bool streamed) {
  if (n.count == kVecSize<Real<T>>)
    store(to, v, FullVec<Real<T>>{}, streamed);
  else
    store(to, v, n.count, false);
}

// ---- channels last ----

template <class T>
bool rows_are_streamed(const Problem& p, const T* first, const T* second) {
  return p.streaming_stores && p.channels % kVecSize<Real<T>> == 0 && phase_of(first) == 0 &&
         (!second || phase_of(second) == 0);
}

// The number of positions whose statistics are computed together, because each waits long for its own: as
// many as a vector has elements, while their rows are few enough for the L1 cache.
template <class T>
int64_t positions_together(const Problem& p) {
  constexpr int64_t kBytes = 24 << 10;
  const int64_t fit = kBytes / (p.modalities * p.channels * int64_t{sizeof(T)});
  return smaller(kVecSize<Real<T>>, larger(1, fit));
}

// Sums of deviations from a shift, per position, for as many positions as a vector has elements.
template <class R>
struct PositionSums {
  Vec<R> shift{}, sum{}, squares{};

  // Sets mean and variance over `channels` values.
  CEN_INLINE void moments(int64_t channels, Vec<R>* mean, Vec<R>* var) const {
    const R per_channel = R(1) / static_cast<R>(channels);
    const Vec<R> moved = sum * per_channel, of = squares * per_channel - moved * moved;
    *mean = shift + moved;
    *var = of < 0 ? Vec<R>{} : of;
  }
};

// Mean and variance of a position whose squares are not finite. value(c) returns that of a channel.
template <class R, class Value>
CEN_INLINE void set_wide_moments(int64_t channels, int64_t position, Vec<R>* mean, Vec<R>* var, Value value) {
  const Moments wide = wide_moments(channels, [&](auto f) {
    for (int64_t c = 0; c < channels; ++c) f(value(c));
  });
  (*mean)[position] = static_cast<R>(wide.mean);
  (*var)[position] = static_cast<R>(wide.squares / channels);
}

// Sums over a row, of deviations from the mean of its first eighth (MomentSums says why that is close
// enough). Prefetches what lies `distance` values ahead, a line for each that is read: those of a burst wait
// for each other.
template <class T>
CEN_INLINE void sum_row(const T* row, int64_t channels, int64_t distance, int64_t position,
                        PositionSums<Real<T>>* of) {
  using R = Real<T>;
  const int64_t sample = smaller(channels, divide_up(channels, 8 * kVecSize<R>) * kVecSize<R>);
  Vec<R> rough{};
  walk_values<R, 1>(0, sample, 0, [&](int64_t at, auto n, auto) CEN_INLINE_LAMBDA {
    rough += first_elements<R>(load(row + at, n), n);
  });
  const R shift = add_elements<R>(rough) / static_cast<R>(sample);
  MomentSums<R> sums[4];
  walk_values<R, 4>(0, channels, 0, [&](int64_t at, auto n, auto slot) CEN_INLINE_LAMBDA {
    if (slot * kPackedBytes<T> % 64 == 0) __builtin_prefetch(row + at + distance, 0, 2);
    sums[slot].add(first_elements<R>(load(row + at, n) - splat(shift), n));
  });
  of->shift[position] = shift;
  of->sum[position] = add_elements<R>((sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum));
  of->squares[position] =
      add_elements<R>((sums[0].squares + sums[1].squares) + (sums[2].squares + sums[3].squares));
}

// Sets and stores the statistics of rows [row, row + n.count) of modality m, and prefetches what lies
// `distance` values ahead.
template <class T>
__attribute__((noinline)) void set_row_statistics(const Problem& p, const ForwardTensors<T>& t,
                                                  const RowBlocks& blocks, int64_t m, int64_t row, Some n,
                                                  int64_t distance,
                                                  const PositionStatistics<Real<T>>& statistics) {
  using R = Real<T>;
  const T* unit = t.x + m * p.modality_stride();
  PositionSums<R> sums;
  for (int64_t i = 0; i < n.count; ++i) {
    const T* x = unit + blocks.offset(row + i);
    sum_row(x, p.channels, distance, i, &sums);
  }
  Vec<R> mean, var;
  sums.moments(p.channels, &mean, &var);
  for (int64_t i = 0; i < n.count; ++i)
    if (!is_finite(sums.squares[i])) {
      const T* x = unit + blocks.offset(row + i);
      set_wide_moments<R>(p.channels, i, &mean, &var, [&](int64_t c) { return load(x + c, int64_t{1})[0]; });
    }
  statistics.set(m, 0, mean, var, p.eps);
  store(t.batch_mean + m * p.values() + row, mean, n, false);
  store(t.batch_var + m * p.values() + row, var, n, false);
}

// Stores the vectors of a row's channels.
template <class T>
CEN_INLINE void store_row(T* to, const Vec<Real<T>>* from, int64_t channels, bool streamed) {
  constexpr FullVec<Real<T>> all;
  const int64_t whole = channels / all, left = channels % all;
  const auto put = [&](bool streamed) CEN_INLINE_LAMBDA {
    for (int64_t strip = 0; strip < whole; ++strip) store(to + strip * all, from[strip], all, streamed);
  };
  if (streamed)
    put(true);
  else
    put(false);
  if (left) store(to + whole * all, from[whole], left, false);
}

template <ActivationForm kForm, Exchange kExchange, class T>
void forward_rows(const Problem& p, const ForwardTensors<T>& tensors, const Tables<Real<T>>& tables,
                  const Parallel& parallel) {
  using R = Real<T>;
  const RowBlocks blocks(p, p.values());
  const GroupInputs<T> shared(p, tables, tensors.x, tensors.residual, nullptr);
  const int64_t positions = positions_together<T>(p);
  parallel_ranges(parallel, p.values(), [&](int64_t begin, int64_t end) {
    // Copies, which no store of a vector can change, as compilers see.
    const ForwardTensors<T> t = tensors;
    const GroupInputs<T> group = shared;
    const bool streamed = rows_are_streamed<T>(p, t.y, nullptr);
    const Coefficients<R>* const coefficients = tables.unit(0);
    const int64_t strips = tables.strips;
    // Per modality: y of the position. Non-temporal stores are slow unless those of a row follow each other.
    const Buffer<Vec<R>> results(p.modalities * strips);
    const Scratch<R> scratch(p.modalities);
    const PositionStatistics<R> statistics(p.modalities, 1);
    for (int64_t row = begin; row < end; row += positions) {
      const Some n{smaller(positions, end - row)};
      for (int64_t m = 0; m < p.modalities; ++m)
        set_row_statistics(p, t, blocks, m, row, n, 2 * positions * p.channels, statistics);
      for (int64_t i = 0; i < n.count; ++i) {
        const int64_t first = blocks.offset(row + i);
        blocks.for_strips<R>([&](int64_t strip, auto n) CEN_INLINE_LAMBDA {
          const Coefficients<R>* own = coefficients + strip;
          for_participants<kExchange>(group, own, [&](auto exchange, int64_t m) CEN_INLINE_LAMBDA {
            const Together<T, decltype(exchange)::value, kForm> together(group, scratch);
            const PositionChannels<R> channels(own + m * group.row_stride, group.row_stride, statistics, m,
                                               i);
            together.forward(first + m * group.stride + strip * kVecSize<R>, n, channels,
                             [&](int64_t k, int64_t, Vec<R> y)
                                 CEN_INLINE_LAMBDA { results[(m + k) * strips + strip] = y; });
          });
        });
        for (int64_t m = 0; m < p.modalities; ++m)
          store_row(t.y + first + m * group.stride, results.get() + m * strips, p.channels, streamed);
      }
    }
  });
}

// The sums of dz and dz * xhat per block, modality and channel.
struct AffineRows {
  const BlockRows dz, dz_xhat;

  AffineRows(int64_t blocks, int64_t modalities, int64_t padded)
      : dz(blocks, modalities, padded), dz_xhat(blocks, modalities, padded) {}

  // Writes the totals over the blocks to dweight and dbias.
  template <class T>
  void write_totals(const Problem& p, const BackwardTensors<T>& t, int64_t blocks,
                    const Parallel& parallel) const {
    for_pieces(p, parallel, [&](int64_t m, int64_t first_c, int64_t last_c) {
      for (int64_t b = 1; b < blocks; ++b)
        for (int64_t c = first_c; c < last_c; ++c) {
          dz.row(0, m)[c] += dz.row(b, m)[c];
          dz_xhat.row(0, m)[c] += dz_xhat.row(b, m)[c];
        }
      for (int64_t c = first_c; c < last_c; ++c) {
        const bool unread = is_unread(p, t.weight, t.route, m, c);
        t.dbias[m * p.channels + c] = static_cast<Real<T>>(dz.row(0, m)[c]);
        t.dweight[m * p.channels + c] = unread ? 0 : static_cast<Real<T>>(dz_xhat.row(0, m)[c]);
      }
    });
  }
};

// dx = invstd * dxhat + (x - mean) * on_x + constant, where dxhat = weight * dz.
template <class R>
struct OfStatistics {
  R on_x, constant;

  // From the sums of dxhat and dxhat * (x - mean) over the channels.
  CEN_INLINE OfStatistics(R dxhat, R dxhat_x, R invstd, int64_t channels)
      : on_x(-(dxhat_x * invstd * invstd * invstd) / static_cast<R>(channels)),
        constant(-(dxhat * invstd) / static_cast<R>(channels)) {}
};

// The number of rows in blocks that two, four or eight threads share evenly.
inline int64_t rows_of_even_blocks(const Problem& p) {
  const int64_t most = larger(32, smaller(256, 65536 / p.channels));
  return divide_up(p.values(), 8 * divide_up(p.values(), 8 * most));
}

template <ActivationForm kForm, Exchange kExchange, class T>
void backward_rows(const Problem& p, const BackwardTensors<T>& tensors, const Tables<Real<T>>& tables,
                   const Parallel& parallel) {
  using R = Real<T>;
  const RowBlocks blocks(p, rows_of_even_blocks(p));
  const GroupInputs<T> shared(p, tables, tensors.x, tensors.residual, tensors.dy);
  const int64_t strips = tables.strips, distance = 2 * positions_together<T>(p) * p.channels;
  const AffineRows affine(blocks.count, p.modalities, strips * kVecSize<R>);
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    // Copies, which no store of a vector can change, as compilers see.
    const BackwardTensors<T> t = tensors;
    const bool streamed = rows_are_streamed<T>(p, t.dx, t.dresidual);
    const Coefficients<R>* const coefficients = tables.unit(0);
    const GroupInputs<T> group = shared;
    const Scratch<R> scratch(p.modalities);
    const PositionStatistics<R> statistics(p.modalities, 1);
    // Per modality: dxhat of the position, and its sums; per channel: the sums of the block.
    const Buffer<Vec<R>> dxhat(p.modalities * strips), row_sums(2 * p.modalities),
        channel_sums(2 * p.modalities * strips);
    for (int64_t b = begin; b < end; ++b) {
      std::memset(static_cast<void*>(channel_sums.get()), 0, 2 * p.modalities * strips * sizeof(Vec<R>));
      for (int64_t row = blocks.begin(b); row < blocks.end(b); ++row) {
        const int64_t first = blocks.offset(row), position = (row - blocks.begin(b)) % kVecSize<R>;
        if (position == 0) {
          const Some n{smaller(kVecSize<R>, blocks.end(b) - row)};
          for (int64_t m = 0; m < p.modalities; ++m) {
            const int64_t i = m * p.values() + row;
            statistics.set(m, 0, load(t.mean + i, n), load(t.var + i, n), p.eps);
          }
        }
        std::memset(static_cast<void*>(row_sums.get()), 0, 2 * p.modalities * sizeof(Vec<R>));
        blocks.for_strips<R>([&](int64_t strip, auto n) CEN_INLINE_LAMBDA {
          const Coefficients<R>* own = coefficients + strip;
          for_participants<kExchange>(group, own, [&](auto exchange, int64_t first_m) CEN_INLINE_LAMBDA {
            const Together<T, decltype(exchange)::value, kForm> together(group, scratch);
            const PositionChannels<R> channels(own + first_m * group.row_stride, group.row_stride, statistics,
                                               first_m, position);
            together.backward(first + first_m * group.stride + strip * kVecSize<R>, n, channels,
                              [&](int64_t k, int64_t at, Vec<R> g, Vec<R> dz, Vec<R> x) CEN_INLINE_LAMBDA {
                                const int64_t m = first_m + k;
                                __builtin_prefetch(t.x + at + distance, 0, 2);
                                __builtin_prefetch(t.dy + at + distance, 0, 2);
                                const Vec<R> d = channels.centered(k, x), of_xhat = dz * channels.weight(k);
                                dxhat[m * strips + strip] = of_xhat;
                                row_sums[2 * m] += of_xhat;
                                row_sums[2 * m + 1] += of_xhat * d;
                                Vec<R>* sums = channel_sums.get() + 2 * (m * strips + strip);
                                sums[0] += dz;
                                sums[1] += dz * (d * channels.invstd(k));
                                if (t.dresidual) store(t.dresidual + at, g, n, false);
                              });
          });
        });
        for (int64_t m = 0; m < p.modalities; ++m) {
          const R mean = statistics.mean(m)[position], invstd = statistics.invstd(m)[position];
          const OfStatistics<R> of(add_elements<R>(row_sums[2 * m]), add_elements<R>(row_sums[2 * m + 1]),
                                   invstd, p.channels);
          const int64_t row_first = first + m * group.stride;
          blocks.for_strips<R>([&](int64_t strip, auto n) CEN_INLINE_LAMBDA {
            const int64_t at = row_first + strip * kVecSize<R>;
            const Vec<R> d = load(t.x + at, n) - splat(mean);
            store(t.dx + at,
                  dxhat[m * strips + strip] * splat(invstd) + (d * splat(of.on_x) + splat(of.constant)), n,
                  streamed);
          });
        }
      }
      for (int64_t m = 0; m < p.modalities; ++m)
        for (int64_t strip = 0; strip < strips; ++strip) {
          const Vec<R>* sums = channel_sums.get() + 2 * (m * strips + strip);
          for_wide_parts(
              [&](int64_t element, Vec<double> dz, Vec<double> dz_xhat, Vec<double>) {
                store_row(affine.dz.row(b, m) + strip * kVecSize<R> + element, dz);
                store_row(affine.dz_xhat.row(b, m) + strip * kVecSize<R> + element, dz_xhat);
              },
              sums[0], sums[1], sums[1]);
        }
    }
  });
  affine.write_totals(p, tensors, blocks.count, parallel);
}

// ---- channels first: the elements of a vector are positions ----

constexpr int64_t kMostVectors = 128 / CEN_VECTOR_BYTES;  // per tile

// Blocks of the positions of a sample, and tiles of those in a block: as many as keep whole cache lines busy.
struct PositionBlocks {
  static constexpr int64_t kPositions = 512;  // per block
  int64_t per_sample, count;

  explicit PositionBlocks(const Problem& p)
      : per_sample(divide_up(p.spatial, kPositions)), count(p.samples * per_sample) {}

  // Calls f(at, row, n, vectors) for the tiles of a block: `vectors` vectors of n positions, of which the
  // first has the offset `at` in modality 0 and number `row` among all positions of a modality.
  template <class R, class F>
  CEN_INLINE void for_tiles(const Problem& p, int64_t b, F f) const {
    constexpr int64_t kStep = kVecSize<R>;
    const int64_t sample = b / per_sample, begin = b % per_sample * kPositions,
                  end = smaller(p.spatial, begin + kPositions);
    const auto tile = [&](int64_t position, int64_t n, int64_t vectors) CEN_INLINE_LAMBDA {
      f(sample * p.sample_stride() + position, sample * p.spatial + position, Some{n}, vectors);
    };
    int64_t position = begin;
    while (position + kStep <= end) {
      const int64_t vectors = smaller(kMostVectors, (end - position) / kStep);
      tile(position, kStep, vectors);
      position += vectors * kStep;
    }
    if (position < end) tile(position, end - position, 1);
  }
};

// As PositionChannels, for one channel of vector v of positions.
template <class R>
class ChannelOfPositions {
 public:
  CEN_INLINE ChannelOfPositions(const Coefficients<R>* first, int64_t element, int64_t row_stride,
                                const PositionStatistics<R>& statistics, int64_t first_m, int64_t v)
      : first_(first),
        element_(element),
        row_stride_(row_stride),
        statistics_(statistics),
        first_m_(first_m),
        v_(v) {}

  CEN_INLINE Vec<R> weight(int64_t m) const { return splat(at(m).scale[element_]); }
  CEN_INLINE Vec<R> invstd(int64_t m) const { return statistics_.invstd(first_m_ + m, v_); }
  CEN_INLINE Vec<R> centered(int64_t m, Vec<R> x) const { return x - statistics_.mean(first_m_ + m, v_); }
  CEN_INLINE Vec<R> z(int64_t m, Vec<R> x) const {
    return centered(m, x) * (weight(m) * invstd(m)) + splat(at(m).offset[element_]);
  }
  CEN_INLINE Bits<R> replaced(int64_t m) const { return at(m).replaced[element_]; }

 private:
  CEN_INLINE const Coefficients<R>& at(int64_t m) const { return first_[m * row_stride_]; }

  const Coefficients<R>* const first_;
  const int64_t element_, row_stride_;
  const PositionStatistics<R>& statistics_;
  const int64_t first_m_, v_;
};

// Calls f(exchange, m, channels, at, v) for the participants in the exchange of every channel of a tile.
template <class T, class F>
CEN_INLINE void for_channels_of_tile(const Problem& p, const GroupInputs<T>& group,
                                     const Tables<Real<T>>& tables,
                                     const PositionStatistics<Real<T>>& statistics, int64_t at,
                                     int64_t vectors, F f) {
  using R = Real<T>;
  for (int64_t c = 0; c < p.channels; ++c) {
    const Coefficients<R>* own = &tables.at(0, c);
    const int64_t element = c % kVecSize<R>;
    with_exchange(p.modalities, group.routed, own->exchanged[element], [&](auto exchange) CEN_INLINE_LAMBDA {
      const int64_t calls = decltype(exchange)::value == Exchange::none ? p.modalities : 1;
      for (int64_t m = 0; m < calls; ++m)
        for (int64_t v = 0; v < vectors; ++v) {
          const ChannelOfPositions<R> channel(own + m * group.row_stride, element, group.row_stride,
                                              statistics, m, v);
          f(exchange, m, channel, at + m * group.stride + c * p.spatial + v * kVecSize<R>, c, v);
        }
    });
  }
}

// Mean and variance over the channels, of a vector of positions whose first channel is at x.
template <class T>
CEN_INLINE void position_moments(const Problem& p, const T* x, Some n, Vec<Real<T>>* mean,
                                 Vec<Real<T>>* var) {
  using R = Real<T>;
  PositionSums<R> sums;
  for (int64_t c = 0; c < p.channels; ++c) sums.shift += load(x + c * p.spatial, n);
  sums.shift *= R(1) / static_cast<R>(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    const Vec<R> d = load(x + c * p.spatial, n) - sums.shift;
    sums.sum += d;
    sums.squares += d * d;
  }
  sums.moments(p.channels, mean, var);
  for (int64_t i = 0; i < n.count; ++i)
    if (!is_finite(sums.squares[i]))
      set_wide_moments<R>(p.channels, i, mean, var,
                          [&](int64_t c) { return load(x + c * p.spatial + i, int64_t{1})[0]; });
}

template <class T>
bool lines_are_streamed(const Problem& p, const T* first, const T* second) {
  return p.streaming_stores && p.spatial % kVecSize<Real<T>> == 0 && phase_of(first) == 0 &&
         (!second || phase_of(second) == 0);
}

template <ActivationForm kForm, class T>
void forward_positions(const Problem& p, const ForwardTensors<T>& tensors, const Tables<Real<T>>& tables,
                       const Parallel& parallel) {
  using R = Real<T>;
  const PositionBlocks blocks(p);
  const GroupInputs<T> shared(p, tables, tensors.x, tensors.residual, nullptr);
  const bool streamed = lines_are_streamed<T>(p, tensors.y, nullptr);
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    // Copies, which no store of a vector can change, as compilers see.
    const ForwardTensors<T> t = tensors;
    const GroupInputs<T> group = shared;
    const Scratch<R> scratch(p.modalities);
    const PositionStatistics<R> statistics(p.modalities, kMostVectors);
    for (int64_t b = begin; b < end; ++b)
      blocks.for_tiles<R>(p, b, [&](int64_t tile, int64_t row, Some n, int64_t vectors) CEN_INLINE_LAMBDA {
        for (int64_t m = 0; m < p.modalities; ++m)
          for (int64_t v = 0; v < vectors; ++v) {
            Vec<R> mean, var;
            position_moments(p, t.x + tile + m * group.stride + v * kVecSize<R>, n, &mean, &var);
            statistics.set(m, v, mean, var, p.eps);
            const int64_t i = m * p.values() + row + v * kVecSize<R>;
            store(t.batch_mean + i, mean, n, false);
            store(t.batch_var + i, var, n, false);
          }
        for_channels_of_tile<T>(
            p, group, tables, statistics, tile, vectors,
            [&](auto exchange, int64_t, const auto& channel, int64_t at, int64_t, int64_t) CEN_INLINE_LAMBDA {
              const Together<T, decltype(exchange)::value, kForm> together(group, scratch);
              together.forward(at, n, channel, [&](int64_t, int64_t own, Vec<R> y) CEN_INLINE_LAMBDA {
                store(t.y + own, y, n, streamed);
              });
            });
      });
  });
}

template <ActivationForm kForm, class T>
void backward_positions(const Problem& p, const BackwardTensors<T>& tensors, const Tables<Real<T>>& tables,
                        const Parallel& parallel) {
  using R = Real<T>;
  const PositionBlocks blocks(p);
  const GroupInputs<T> shared(p, tables, tensors.x, tensors.residual, tensors.dy);
  const bool streamed = lines_are_streamed<T>(p, tensors.dx, tensors.dresidual);
  const int64_t of_channels = p.modalities * p.channels, of_tile = p.modalities * kMostVectors;
  const AffineRows affine(blocks.count, p.modalities, p.channels);
  parallel_ranges(parallel, blocks.count, [&](int64_t begin, int64_t end) {
    // Copies, which no store of a vector can change, as compilers see.
    const BackwardTensors<T> t = tensors;
    const GroupInputs<T> group = shared;
    const Scratch<R> scratch(p.modalities);
    const PositionStatistics<R> statistics(p.modalities, kMostVectors);
    // Per vector of positions: the sums of dxhat and dxhat * (x - mean), then what dx takes from them; per
    // channel: the sums of the block.
    const Buffer<Vec<R>> dxhat(of_tile), dxhat_x(of_tile), dz_sums(of_channels), dz_xhat_sums(of_channels);
    for (int64_t b = begin; b < end; ++b) {
      std::memset(static_cast<void*>(dz_sums.get()), 0, of_channels * sizeof(Vec<R>));
      std::memset(static_cast<void*>(dz_xhat_sums.get()), 0, of_channels * sizeof(Vec<R>));
      blocks.for_tiles<R>(p, b, [&](int64_t tile, int64_t row, Some n, int64_t vectors) CEN_INLINE_LAMBDA {
        std::memset(static_cast<void*>(dxhat.get()), 0, of_tile * sizeof(Vec<R>));
        std::memset(static_cast<void*>(dxhat_x.get()), 0, of_tile * sizeof(Vec<R>));
        for (int64_t m = 0; m < p.modalities; ++m)
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t i = m * p.values() + row + v * kVecSize<R>;
            statistics.set(m, v, load(t.mean + i, n), load(t.var + i, n), p.eps);
          }
        const auto pass = [&](auto put) CEN_INLINE_LAMBDA {
          for_channels_of_tile<T>(
              p, group, tables, statistics, tile, vectors,
              [&](auto exchange, int64_t first_m, const auto& channel, int64_t at, int64_t c, int64_t v)
                  CEN_INLINE_LAMBDA {
                    const Together<T, decltype(exchange)::value, kForm> together(group, scratch);
                    together.backward(at, n, channel,
                                      [&](int64_t k, int64_t own, Vec<R> g, Vec<R> dz, Vec<R> x)
                                          CEN_INLINE_LAMBDA {
                                            put(first_m + k, c, v, own, g, dz, channel.centered(k, x),
                                                channel.weight(k), channel.invstd(k));
                                          });
                  });
        };
        pass([&](int64_t m, int64_t c, int64_t v, int64_t, Vec<R>, Vec<R> dz, Vec<R> d, Vec<R> weight,
                 Vec<R> invstd) CEN_INLINE_LAMBDA {
          dxhat[m * kMostVectors + v] += dz * weight;
          dxhat_x[m * kMostVectors + v] += dz * weight * d;
          dz_sums[m * p.channels + c] += dz;
          dz_xhat_sums[m * p.channels + c] += dz * (d * invstd);
        });
        for (int64_t m = 0; m < p.modalities; ++m)
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t i = m * kMostVectors + v;
            const Vec<R> invstd = statistics.invstd(m, v),
                         per_channel = invstd * (R(1) / static_cast<R>(p.channels));
            dxhat[i] = -(dxhat[i] * per_channel);
            dxhat_x[i] = -(dxhat_x[i] * invstd * invstd * per_channel);
          }
        pass([&](int64_t m, int64_t, int64_t v, int64_t own, Vec<R> g, Vec<R> dz, Vec<R> d, Vec<R> weight,
                 Vec<R> invstd) CEN_INLINE_LAMBDA {
          const Vec<R> of_statistics = d * dxhat_x[m * kMostVectors + v] + dxhat[m * kMostVectors + v];
          store(t.dx + own, dz * weight * invstd + of_statistics, n, streamed);
          if (t.dresidual) store(t.dresidual + own, g, n, streamed);
        });
      });
      for (int64_t m = 0; m < p.modalities; ++m)
        for (int64_t c = 0; c < p.channels; ++c) {
          affine.dz.row(b, m)[c] = sum_elements(dz_sums[m * p.channels + c]);
          affine.dz_xhat.row(b, m)[c] = sum_elements(dz_xhat_sums[m * p.channels + c]);
        }
    }
  });
  affine.write_totals(p, tensors, blocks.count, parallel);
}

// relu hardly follows a layer norm: it has no form of its own here.
template <class T>
void forward_layer(const Problem& of_call, const ForwardTensors<T>& t, const Parallel& parallel) {
  const Problem p = of_positions(of_call);
  const Tables<Real<T>> tables(p, t.weight, t.route);
  set_weights(p, t.weight, t.bias, tables);
  with_form<T, false>(p.activation, [&](auto form) {
    constexpr ActivationForm kForm = decltype(form)::value;
    if (p.channels_last)
      with_exchange(p.modalities, tables.routed, tables.any_exchanged(), [&](auto exchange) {
        forward_rows<kForm, decltype(exchange)::value>(p, t, tables, parallel);
      });
    else
      forward_positions<kForm>(p, t, tables, parallel);
  });
}

template <class T>
void backward_layer(const Problem& of_call, const BackwardTensors<T>& t, const Parallel& parallel) {
  const Problem p = of_positions(of_call);
  const Tables<Real<T>> tables(p, t.weight, t.route);
  set_weights(p, t.weight, t.bias, tables);
  with_form<T, false>(p.activation, [&](auto form) {
    constexpr ActivationForm kForm = decltype(form)::value;
    if (p.channels_last)
      with_exchange(p.modalities, tables.routed, tables.any_exchanged(), [&](auto exchange) {
        backward_rows<kForm, decltype(exchange)::value>(p, t, tables, parallel);
      });
    else
      backward_positions<kForm>(p, t, tables, parallel);
  });
}

template <class T>
void normalize(const Problem& p, const ForwardTensors<T>& t, const Parallel& parallel) {
  return p.norm == Norm::layer ? forward_layer(p, t, parallel) : forward(p, t, parallel);
}
template <class T>
void normalize_backward(const Problem& p, const BackwardTensors<T>& t, const Parallel& parallel) {
  return p.norm == Norm::layer ? backward_layer(p, t, parallel) : backward(p, t, parallel);
}

}  // namespace
}  // namespace cen::cpu
