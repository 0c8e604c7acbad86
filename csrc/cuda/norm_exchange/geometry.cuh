// How a launch cuts a problem up.
//
// A strip is a set of channels: of one line a thread row, channels first; of one vector a thread column,
// channels last. Down a strip lie its slices, 16-byte vectors at the same places in every modality. A chunk
// of slices of a strip of a group is a block's work, in all modalities, so that partners are at hand.
//
// A thread keeps to one line or one vector of channels and takes every `line_threads`-th slice of it. What it
// reads it keeps to itself; only sums are shared.
#pragma once

#include "../device.cuh"

namespace cen::cuda {

// n / divisor for 0 <= n < 2^31.
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
  int vec_size;              // values of a vector
  bool vectors;              // vectors are aligned: whole ones are read, else value by value
  int threads_x, threads_y;  // of a block
  int64_t row_slices;        // channels first: of one channel of one sample
  Divider by_row;            // divides by row_slices
  int64_t slices;            // of a strip
  int64_t strips, chunks;    // of the channels; of a strip
  int64_t chunk;             // slices of a chunk

  int64_t blocks(int64_t groups) const { return groups * strips * chunks; }
};

// Elements [begin, end) of the 16-byte vector at `at`, which counts from the unit's first value. Empty when
// this line needs one vector fewer than the longest.
struct VectorSlice {
  int64_t at;
  int begin, end;

  CEN_DEVICE bool empty() const { return begin >= end; }
  CEN_DEVICE bool has(int i) const { return i >= begin && i < end; }
};

// Channels first: how many elements of a line's first vector lie before the line. A vector has a power of
// two.
CEN_DEVICE int line_phase(const Problem& p, const Geometry& geo, int64_t channel) {
  return geo.vectors ? int(channel * p.spatial) & (geo.vec_size - 1) : 0;
}

// How many values of a channel lie in the slices [0, number).
template <bool kLast>
CEN_DEVICE int64_t values_before(const Problem& p, const Geometry& geo, int64_t channel, int64_t number) {
  if constexpr (kLast) return number;
  const int64_t sample = geo.by_row(uint32_t(number)), column = number - sample * geo.row_slices;
  const int64_t position = column * geo.vec_size - line_phase(p, geo, channel);
  return sample * p.spatial + (position < 0 ? 0 : position > p.spatial ? p.spatial : position);
}

// Where a thread works. kLast: channels last.
template <bool kLast>
struct ThreadCoord {
  int64_t chunk, strip, group;
  int line_rank, line_threads;   // this thread's rank among those of its line or vector, and their number
  int line, lines;               // its line or vector in the strip, and how many a block has
  int thread_rank, num_threads;  // in the block
  int64_t first, stop;           // the block's slices
  int64_t begin;  // of the thread's line or vector, from the unit's first value; of its first whole vector
  int phase, elements;  // of the line; of every slice, channels last

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
    num_threads = geo.threads_x * geo.threads_y;
    first = chunk * geo.chunk;
    stop = first + geo.chunk < geo.slices ? first + geo.chunk : geo.slices;
    const int64_t channel = (strip * lines + line) * (kLast ? geo.vec_size : 1), left = p.channels - channel;
    if (left <= 0) stop = first;  // channels that do not exist have no slices
    phase = kLast ? 0 : line_phase(p, geo, channel);
    begin = kLast ? channel : channel * p.spatial - phase;
    elements = left < geo.vec_size ? int(left) : geo.vec_size;
  }

  // Slices that a thread of the block takes at the most.
  CEN_DEVICE int steps(const Geometry& geo) const {
    return (int(geo.chunk) + line_threads - 1) / line_threads;
  }

  // The thread's slice of a step; an empty one past the last.
  CEN_DEVICE VectorSlice slice(const Problem& p, const Geometry& geo, int step) const {
    const int64_t number = first + (step * line_threads + line_rank);
    if (number >= stop) return {0, 0, 0};
    if constexpr (kLast) return {begin + number * p.channels, 0, elements};
    const uint32_t sample = geo.by_row(uint32_t(number));
    const int column = (int(number) - int(sample * uint32_t(geo.row_slices))) * geo.vec_size;
    // Vectors are aligned in memory; the first of a line begins up to a vector before it.
    const int before = phase - column;
    const int64_t left = p.spatial + before;
    return {begin + sample * (p.channels * p.spatial) + column, before > 0 ? before : 0,
            left < geo.vec_size ? int(left < 0 ? 0 : left) : geo.vec_size};
  }
};

// Steps whose vectors a thread fetches together, and works on together.
constexpr int kTile = 2;

struct Tile {
  VectorSlice slices[kTile];
  int kept;  // the step in shared memory of the first slice

  template <bool kLast>
  CEN_DEVICE Tile(const Problem& p, const Geometry& geo, const ThreadCoord<kLast>& coord, int step, int kept)
      : kept(kept) {
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) slices[u] = coord.slice(p, geo, step + u);
  }
};

// Reads and writes of a slice in a tensor of x's layout; base: the unit's first value. Elements that are not
// of the slice may hold anything.
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

// The same into shared memory, in the background where it can be.
template <class T>
CEN_DEVICE void fetch(const Geometry& geo, Vec<T>* shared, const T* base, const VectorSlice& s) {
  if (geo.vectors)
    copy_async16(shared, base + s.at);
  else
    *shared = read(geo, base, s);
}

// The small kernels that finish tables: a block has some channels of one modality, and for each of them
// kFinishThreads threads that share its chunks.
constexpr int kFinishChannels = 32, kFinishThreads = 16;

struct FinishCoord {
  int64_t m, c;
  int rank;
  double* memory;  // [2][kFinishThreads][kFinishChannels]

  static constexpr int64_t kSharedBytes = 2 * kFinishThreads * kFinishChannels * sizeof(double);
  static int64_t blocks(const Problem& p) { return p.modalities * divide_up(p.channels, kFinishChannels); }

  CEN_DEVICE explicit FinishCoord(const Problem& p) {
    const int64_t tiles = divide_up(p.channels, kFinishChannels);
    m = block_index() / tiles;
    c = block_index() % tiles * kFinishChannels + thread_index().x;
    rank = thread_index().y;
    memory = static_cast<double*>(shared_memory());
  }

  // Adds a and b over the threads of each channel, into those of rank 0. All threads must call it.
  CEN_DEVICE void add(double& a, double& b) const {
    const int i = rank * kFinishChannels + thread_index().x;
    constexpr int kNext = kFinishThreads * kFinishChannels;
    memory[i] = a;
    memory[kNext + i] = b;
    sync_threads();
    for (int w = 1; rank == 0 && w < kFinishThreads; ++w) {
      a += memory[i + w * kFinishChannels];
      b += memory[kNext + i + w * kFinishChannels];
    }
    sync_threads();
  }
};

}  // namespace cen::cuda
