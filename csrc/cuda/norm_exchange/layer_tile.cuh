// The decomposition of layer norm into blocks and threads.
//
// A place is one position of a sample (channels last) or the positions of one vector (channels first), in all
// modalities, because they exchange values. A block processes a tile of places at a time, and every
// geo.blocks-th tile; the threads of a place, its team, divide the channels among them. They share sums
// alone: only the thread that loads a vector reads it. While a tile is processed the next one is fetched.
#pragma once

#include "../device.cuh"

namespace cen::cuda {

struct LayerGeometry {
  bool vectors;       // use 16-byte accesses; else access value by value
  bool kept;          // two tiles fit in shared memory; else a tile is read again where it is needed again
  bool sums_kept;     // so do the sums for dweight and dbias; else they are in device memory
  int places, team;   // places per tile, threads per place
  int steps;          // vectors per thread, modality and place
  int64_t row_tiles;  // tiles per sample, channels first; channels last, tiles run on across samples
  int64_t tiles, blocks;

  CEN_HOST_DEVICE int threads() const { return places * team; }
};

// The first `count` of the values at, at + stride, … from the first value of a sample and modality.
struct LayerSlice {
  int64_t at;
  int channel;  // of the first value
  int stride, count;

  CEN_DEVICE bool has(int i) const { return i < count; }
};

// Reads and writes a slice; values outside of it are zero. All slices are whole if vectors are used.
template <class T>
CEN_DEVICE Vec<T> read(const LayerGeometry& geo, const T* base, const LayerSlice& s) {
  if (geo.vectors) return load_vec(base + s.at);
  Vec<T> vec;
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l) vec.element[l] = s.has(l) ? base[s.at + l * s.stride] : T{};
  return vec;
}

template <class T>
CEN_DEVICE void write(const LayerGeometry& geo, T* base, const LayerSlice& s, const Vec<T>& vec) {
  if (geo.vectors) return store_vec(base + s.at, vec);
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l)
    if (s.has(l)) base[s.at + l * s.stride] = vec.element[l];
}

template <bool kLast>
struct LayerThread {
  int rank, place;        // in its team, and of its team
  int index, first;       // in the block, and that of its team's first thread
  int to_next, to_place;  // from a thread's index to that of the next in the team, and in the next team

  CEN_DEVICE explicit LayerThread(const LayerGeometry& geo) {
    const Index3 t = thread_index();
    rank = kLast ? t.x : t.y;
    place = kLast ? t.y : t.x;
    to_next = kLast ? 1 : geo.places;
    to_place = kLast ? geo.team : 1;
    first = place * to_place;
    index = first + rank * to_next;
  }
};

// A thread's part of a tile.
template <class T, bool kLast>
struct LayerTile {
  int sample, position;   // position of the first value
  int stride, positions;  // from a position to the next, and their number

  LayerTile() = default;
  CEN_DEVICE LayerTile(const Problem& p, const LayerGeometry& geo, const LayerThread<kLast>& thread,
                       int64_t tile) {
    constexpr int n = kVecSize<T>;
    if constexpr (kLast) {
      const int64_t number = tile * geo.places + thread.place;
      sample = int(number / p.spatial);
      position = int(number - sample * p.spatial);
      stride = 1;
      positions = number < p.groups * p.spatial;
    } else {
      // Without vectors, neighboring threads access neighboring values.
      sample = int(tile / geo.row_tiles);
      position = int(tile - sample * geo.row_tiles) * geo.places * n + thread.place * (geo.vectors ? n : 1);
      stride = geo.vectors ? 1 : geo.places;
      positions = tile < geo.tiles ? in_reach(int(p.spatial) - position, stride) : 0;
    }
  }

  // How many values of a vector, `stride` apart, come before the end, which is `left` away.
  CEN_DEVICE static int in_reach(int left, int stride) {
    int count = 0;
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) count += l * stride < left;
    return count;
  }

  CEN_DEVICE LayerSlice slice(const Problem& p, const LayerGeometry& geo, const LayerThread<kLast>& thread,
                              int step) const {
    constexpr int n = kVecSize<T>;
    if constexpr (kLast) {
      const int channel = step * geo.team * n + thread.rank * (geo.vectors ? n : 1);
      const int between = geo.vectors ? 1 : geo.team;
      return {position * p.channels + channel, channel, between,
              positions ? in_reach(int(p.channels) - channel, between) : 0};
    } else {
      const int channel = step * geo.team + thread.rank;
      return {channel * p.spatial + position, channel, stride, channel < p.channels ? positions : 0};
    }
  }
};

}  // namespace cen::cuda
