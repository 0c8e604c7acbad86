// The decomposition of a problem into blocks and threads.
//
// A strip is a set of channels: one channel (a line) per threadIdx.y for channels first, one vector of
// channels per threadIdx.x for channels last. A strip consists of slices, 16-byte vectors at the same offsets
// in every modality. A block processes one chunk of the slices of a strip of a group, in all modalities,
// because they exchange values.
//
// A thread processes every `line_threads`-th slice of one line or one vector of channels. Only it reads the
// data that it loads; threads share sums alone.
#pragma once

#include "../device.cuh"

namespace cen::cuda {

// Division n / divisor by multiplication, for 0 <= n < 2^31.
struct Divider {
  uint32_t divisor, factor;
  int shift;

  Divider() : Divider(1) {}
  explicit Divider(uint32_t divisor) : divisor(divisor), shift(31) {
    while ((uint64_t(1) << (shift - 31)) < divisor) ++shift;
    factor = uint32_t((uint64_t(1) << shift) / divisor + 1);
  }
  CEN_HOST_DEVICE uint32_t operator()(uint32_t n) const { return uint32_t((uint64_t(n) * factor) >> shift); }
};

CEN_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int vec_size;              // values per vector
  bool vectors;              // use 16-byte accesses, which need alignment; else access value by value
  int threads_x, threads_y;  // block shape
  int64_t row_slices;        // slices per strip and sample
  Divider by_row;            // divides by row_slices
  int64_t slices;            // slices per strip
  int64_t strips, chunks;    // strips per group, chunks per strip
  int64_t chunk;             // slices per chunk

  CEN_HOST_DEVICE int threads() const { return threads_x * threads_y; }
  int64_t blocks(int64_t groups) const { return groups * strips * chunks; }
};

// Elements [begin, end) of the 16-byte vector at offset `at` from the unit's first value. Empty when this
// line needs one vector fewer than the longest.
struct VectorSlice {
  int64_t at;
  int begin, end;

  CEN_DEVICE bool empty() const { return begin >= end; }
  CEN_DEVICE bool has(int i) const { return i >= begin && i < end; }
};

// Channels first: the number of elements of a line's first vector that precede the line. vec_size is a power
// of two.
CEN_DEVICE int line_phase(const Problem& p, const Geometry& geo, int64_t channel) {
  return geo.vectors ? int(channel * p.spatial) & (geo.vec_size - 1) : 0;
}

// The number of values of a channel in the slices [0, number).
template <bool kLast>
CEN_DEVICE int64_t values_before(const Problem& p, const Geometry& geo, int64_t channel, int64_t number) {
  if constexpr (kLast) return number;
  const int64_t sample = geo.by_row(uint32_t(number)), column = number - sample * geo.row_slices;
  const int64_t position = column * geo.vec_size - line_phase(p, geo, channel);
  return sample * p.spatial + (position < 0 ? 0 : position > p.spatial ? p.spatial : position);
}

// The coordinates of a thread. kLast: channels last.
template <bool kLast>
struct ThreadCoord {
  int64_t chunk, strip, group;
  int line_rank, line_threads;   // rank among the threads of its line or vector, and their number
  int line, lines;               // index of its line or vector in the strip, and their number per block
  int thread_rank, num_threads;  // rank in the block, and threads per block
  int64_t first, stop;           // the block's slices [first, stop)
  int64_t begin;                 // offset of its line's first vector from the unit's first value
  int phase, elements;           // line_phase() of its line; values per slice, channels last

  CEN_DEVICE ThreadCoord(const Problem& p, const Geometry& geo) {
    const Index3 t = thread_index();
    const int64_t block = block_index();
    chunk = block % geo.chunks;
    strip = block / geo.chunks % geo.strips;
    group = block / geo.chunks / geo.strips;
    line_rank = kLast ? t.y : t.x;
    line_threads = kLast ? geo.threads_y : geo.threads_x;
    line = kLast ? t.x : t.y;
    lines = kLast ? geo.threads_x : geo.threads_y;
    thread_rank = t.y * geo.threads_x + t.x;
    num_threads = geo.threads();
    first = chunk * geo.chunk;
    stop = first + geo.chunk < geo.slices ? first + geo.chunk : geo.slices;
    const int64_t channel = (strip * lines + line) * (kLast ? geo.vec_size : 1), left = p.channels - channel;
    if (left <= 0) stop = first;  // padding channels have no slices
    phase = kLast ? 0 : line_phase(p, geo, channel);
    begin = kLast ? channel : channel * p.spatial - phase;
    elements = left < geo.vec_size ? int(left) : geo.vec_size;
  }

  // The maximum number of slices per thread of the block.
  CEN_DEVICE int steps(const Geometry& geo) const {
    return (int(geo.chunk) + line_threads - 1) / line_threads;
  }

  // The slice of this thread at a step; empty past the last one.
  CEN_DEVICE VectorSlice slice(const Problem& p, const Geometry& geo, int step) const {
    const int64_t number = first + (step * line_threads + line_rank);
    if (number >= stop) return {0, 0, 0};
    if constexpr (kLast) {
      int64_t at = begin + number * p.channels;
      if (p.order == Order::sample)  // rows of the other modalities lie between the samples
        at += geo.by_row(uint32_t(number)) * (p.sample_stride() - p.row_size());
      return {at, 0, elements};
    }
    const uint32_t sample = geo.by_row(uint32_t(number));
    const int column = (int(number) - int(sample * uint32_t(geo.row_slices))) * geo.vec_size;
    // Vectors are aligned in memory; the first of a line may begin before it, by less than a vector.
    const int before = phase - column;
    const int64_t left = p.spatial + before;
    return {begin + sample * p.sample_stride() + column, before > 0 ? before : 0,
            left < geo.vec_size ? int(left < 0 ? 0 : left) : geo.vec_size};
  }
};

// Steps per tile, whose vectors a thread fetches and processes together.
constexpr int kTile = 2;

struct Tile {
  VectorSlice slices[kTile];
  int storage_step;  // index of the first slice's step in Storage

  template <bool kLast>
  CEN_DEVICE Tile(const Problem& p, const Geometry& geo, const ThreadCoord<kLast>& coord, int step,
                  int storage_step)
      : storage_step(storage_step) {
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) slices[u] = coord.slice(p, geo, step + u);
  }
};

// Reads and writes a slice of a tensor with the layout of x; base is the unit's first value. Elements outside
// the slice are undefined.
template <class T>
CEN_DEVICE Vec<T> read(const Geometry& geo, const T* base, const VectorSlice& s) {
  if (geo.vectors) return load_vec(base + s.at);
  Vec<T> vec;
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l) vec.element[l] = s.has(l) ? base[s.at + l] : T{};
  return vec;
}

template <class T>
CEN_DEVICE void write(const Geometry& geo, T* base, const VectorSlice& s, const Vec<T>& vec) {
  if (geo.vectors && s.begin == 0 && s.end == kVecSize<T>) {
    store_vec(base + s.at, vec);
    return;
  }
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l)
    if (s.has(l)) base[s.at + l] = vec.element[l];
}

// Reads a slice to shared memory, asynchronously if vectors are aligned.
template <class T>
CEN_DEVICE void fetch(const Geometry& geo, Vec<T>* shared, const T* base, const VectorSlice& s) {
  if (geo.vectors)
    copy_async16(shared, base + s.at);
  else
    *shared = read(geo, base, s);
}

// The threads of the kernels that reduce over chunks: a block has kFinishChannels columns of kFinishThreads
// threads, which divide the chunks of a channel among them.
constexpr int kFinishChannels = 32, kFinishThreads = 16;

struct FinishBlock {
  int column, rank;
  double* memory;  // [2][kFinishThreads][kFinishChannels]

  static constexpr int64_t kSharedBytes = 2 * kFinishThreads * kFinishChannels * sizeof(double);

  CEN_DEVICE FinishBlock()
      : column(thread_index().x), rank(thread_index().y), memory(static_cast<double*>(shared_memory())) {}

  // Sums a and b over the threads of each column; rank 0 gets the result. All threads must call it.
  CEN_DEVICE void add(double& a, double& b) const {
    const int i = rank * kFinishChannels + column;
    keep(i, a, b);
    for (int w = 1; rank == 0 && w < kFinishThreads; ++w) take(i + w * kFinishChannels, a, b);
    sync_threads();
  }

  // Sums a and b over all threads; rank 0 of column 0 gets the result.
  CEN_DEVICE void add_all(double& a, double& b) const {
    add(a, b);
    keep(rank * kFinishChannels + column, a, b);
    for (int i = 1; rank == 0 && column == 0 && i < kFinishChannels; ++i) take(i, a, b);
  }

 private:
  static constexpr int kNext = kFinishThreads * kFinishChannels;

  CEN_DEVICE void keep(int i, double a, double b) const {
    memory[i] = a;
    memory[kNext + i] = b;
    sync_threads();
  }
  CEN_DEVICE void take(int i, double& a, double& b) const {
    a += memory[i];
    b += memory[kNext + i];
  }
};

// Its coordinates where every column is a channel of one modality.
struct FinishCoord : FinishBlock {
  int64_t m, c;

  static int64_t blocks(const Problem& p) { return p.modalities * divide_up(p.channels, kFinishChannels); }

  CEN_DEVICE explicit FinishCoord(const Problem& p) {
    const int64_t tiles = divide_up(p.channels, kFinishChannels);
    m = block_index() / tiles;
    c = block_index() % tiles * kFinishChannels + column;
  }
};

// The same where a block joins the channels [begin, end) of a unit, which share statistics.
struct JoinCoord : FinishBlock {
  int64_t statistic, unit, begin, end;

  static int64_t blocks(const Problem& p) { return p.units() * (p.channels / p.joined); }

  CEN_DEVICE explicit JoinCoord(const Problem& p) {
    const int64_t sets = p.channels / p.joined;
    statistic = block_index();
    unit = statistic / sets;
    begin = statistic % sets * p.joined;
    end = begin + p.joined;
  }
};

// Coord is one of the two.
template <class Coord>
Launch finish_shape(const Problem& p, void* stream) {
  return {Coord::blocks(p), kFinishChannels, kFinishThreads, Coord::kSharedBytes, 1, false, stream};
}

}  // namespace cen::cuda
