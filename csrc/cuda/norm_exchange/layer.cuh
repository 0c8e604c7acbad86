// Layer norm: the shared memory of a block, and what both directions do with a vector.
#pragma once

#include "gradients.cuh"
#include "layer_tile.cuh"

namespace cen::cuda {

// Threads per block, and blocks per multiprocessor, which registers limit.
constexpr int kLayerThreads = 256;
template <class T>
constexpr int kLayerForwardBlocks = sizeof(T) == 8 ? 2 : 3;
template <class T>
constexpr int kLayerBackwardBlocks = sizeof(T) == 8 ? 1 : 2;

// The statistics of a place and modality: xhat = (x - center) * invstd + low.
template <class R, int n>
struct LayerRow {
  Array<R, n> center, invstd, low;
};

// Sums over a block's positions for dbias and dweight, each thread's apart:
// [2][M][steps][kPieces][threads].
template <class T, bool kLast>
struct LayerSums {
  using R = Real<T>;
  using Piece = std::conditional_t<kLast, Vec<R>, R>;
  static constexpr int kPieceSize = sizeof(Piece) / sizeof(R);
  static constexpr int kPieces = kLast ? kVecSize<T> / kPieceSize : 1;

  Piece* pieces;

  static CEN_HOST_DEVICE int64_t size(const Problem& p, const LayerGeometry& geo) {
    return rows(p, geo) * kPieces * geo.threads();
  }
  static CEN_HOST_DEVICE int64_t rows(const Problem& p, const LayerGeometry& geo) {
    return 2 * p.modalities * geo.steps;
  }

  CEN_DEVICE R* piece(const LayerGeometry& geo, int64_t row, int number, int thread) const {
    return reinterpret_cast<R*>(pieces + (row * kPieces + number) * geo.threads() + thread);
  }

  CEN_DEVICE void clear(const Problem& p, const LayerGeometry& geo, int thread) const {
    for (int64_t i = 0; i < rows(p, geo) * kPieces; ++i)
      for (int l = 0; l < kPieceSize; ++l) piece(geo, i / kPieces, int(i % kPieces), thread)[l] = R(0);
  }

  // Channels first, all values of a vector are of one channel.
  CEN_DEVICE void add(const LayerGeometry& geo, int64_t row, int thread, const RealVec<T>& v) const {
    if constexpr (kLast) {
      CEN_UNROLL
      for (int k = 0; k < kPieces; ++k) {
        Piece& at = *reinterpret_cast<Piece*>(piece(geo, row, k, thread));
        Piece sum = at;
        CEN_UNROLL
        for (int l = 0; l < kPieceSize; ++l) sum.element[l] += v.element[k * kPieceSize + l];
        at = sum;
      }
    } else {
      R sum = v.element[0];
      CEN_UNROLL
      for (int l = 1; l < kVecSize<T>; ++l) sum += v.element[l];
      *piece(geo, row, 0, thread) += sum;
    }
  }
};

// The shared memory of a block.
template <class T, bool kLast>
struct LayerMemory {
  using R = Real<T>;
  static constexpr int kPositions = kLast ? 1 : kVecSize<T>;  // of a place
  static constexpr int kChannels = kLast ? kVecSize<T> : 1;   // of a vector
  static constexpr int kRadix = 8;
  using Row = Array<R, kPositions>;

  SharedAllocator allocator;
  Storage<T> storage;             // two tiles
  LayerRow<R, kPositions>* rows;  // [M][places]
  uint8_t* lent;  // [steps][M][M + 1][threads], as Lent: borrower first; last, what one modality alone lends
  R *parts, *totals;  // of up to 2 * M * kPositions sums: [sums][places][line] and [sums][places]
  LayerSums<T, kLast> sums;
  int modalities, places, team, line, threads;

  CEN_HOST_DEVICE LayerMemory(void* shared, const Problem& p, const LayerGeometry& geo, int tensors,
                              bool with_sums)
      : allocator{static_cast<char*>(shared)},
        storage(allocator, p, geo.threads(), tensors, geo.kept ? 2 * geo.steps : 0),
        modalities(int(p.modalities)),
        places(geo.places),
        team(geo.team),
        line(geo.team + 1),  // against bank conflicts
        threads(geo.threads()) {
    const int64_t rows = p.modalities * places;
    this->rows = allocator.alloc<LayerRow<R, kPositions>>(rows);
    lent = allocator.alloc<uint8_t>(geo.steps * p.modalities * (p.modalities + 1) * threads);
    parts = allocator.alloc<R>(2 * rows * kPositions * line);
    totals = allocator.alloc<R>(2 * rows * kPositions);
    sums.pieces = allocator.alloc<typename LayerSums<T, kLast>::Piece>(
        with_sums ? LayerSums<T, kLast>::size(p, geo) : 0);
  }

  CEN_DEVICE LayerRow<R, kPositions>& row(int m, const LayerThread<kLast>& thread) const {
    return rows[m * places + thread.place];
  }
  CEN_DEVICE Lent<kLast>& lent_to(int step, int m, int lender, const LayerThread<kLast>& thread) const {
    return reinterpret_cast<Lent<kLast>*>(
        lent)[((step * modalities + m) * (modalities + 1) + lender) * threads + thread.index];
  }
  CEN_DEVICE Lent<kLast>& alone_in(int step, int m, const LayerThread<kLast>& thread) const {
    return lent_to(step, m, modalities, thread);
  }

  // A thread's contribution to sum `kind` of a modality, and then the sum over its team.
  CEN_DEVICE void give(int kind, int m, const LayerThread<kLast>& thread, const Row& part) const {
    CEN_UNROLL
    for (int l = 0; l < kPositions; ++l)
      parts[sum_index(kind, m, l, thread) * line + thread.rank] = part.element[l];
  }
  CEN_DEVICE Row total(int kind, int m, const LayerThread<kLast>& thread) const {
    Row sum;
    CEN_UNROLL
    for (int l = 0; l < kPositions; ++l) sum.element[l] = totals[sum_index(kind, m, l, thread)];
    return sum;
  }

  // Adds up what the teams gave, `kinds` sums a modality. All threads must call it.
  CEN_DEVICE void add_up(int kinds, const LayerThread<kLast>& thread) const {
    const int sums = kinds * modalities * kPositions * places;
    sync_threads();
    for (int step = 1, segments = 0; segments != 1; step *= kRadix) {
      segments = (team + kRadix * step - 1) / (kRadix * step);
      for (int i = thread.index; i < sums * segments; i += threads) {
        const int sum = i / segments, begin = (i - sum * segments) * kRadix * step;
        R* part = parts + sum * line;
        R value = 0;
        CEN_UNROLL
        for (int k = 0; k < kRadix; ++k)
          if (begin + k * step < team) value += part[begin + k * step];
        (segments == 1 ? totals[sum] : part[begin]) = value;
      }
      sync_threads();
    }
  }

 private:
  CEN_DEVICE int sum_index(int kind, int m, int l, const LayerThread<kLast>& thread) const {
    return ((kind * modalities + m) * kPositions + l) * places + thread.place;
  }
};

// What a thread does with its part of a tile. Tensors is ForwardTensors or BackwardTensors.
template <class T, bool kLast, class Tensors>
struct LayerWork {
  using R = Real<T>;
  using Wide = RealVec<T>;
  using Memory = LayerMemory<T, kLast>;
  using Row = typename Memory::Row;
  static constexpr bool kBackward = std::is_same_v<Tensors, BackwardTensors<T>>;
  enum Tensor { kX, kResidual, kDy };

  const Problem& p;
  const LayerGeometry& geo;
  const Memory& memory;
  const LayerThread<kLast>& thread;
  const Tensors& t;
  LayerTile<T, kLast> tile{};
  int buffer = 0;  // the half of memory.storage that the tile is in

  CEN_HOST_DEVICE static int tensors(const Tensors& t) { return 1 + kBackward + (t.residual != nullptr); }

  CEN_DEVICE LayerSlice slice(int step) const { return tile.slice(p, geo, thread, step); }
  CEN_DEVICE int64_t base(int m) const { return p.offset(m, tile.sample); }
  CEN_DEVICE int64_t statistic(int m, int l) const {
    return p.position_statistic(p.unit(m, tile.sample), tile.position + l * tile.stride);
  }

  CEN_DEVICE Vec<T>& stored(int of_thread, Tensor tensor, int m, int step) const {
    const int number = tensor == kX ? 0 : tensor == kDy ? memory.storage.tensors - 1 : 1;
    return memory.storage.at(of_thread, buffer * geo.steps + step, number, m);
  }
  CEN_DEVICE const T* data(Tensor tensor) const {
    if constexpr (kBackward)
      if (tensor == kDy) return t.dy;
    return tensor == kX ? t.x : t.residual;
  }
  CEN_DEVICE Wide read_wide(Tensor tensor, int m, int step, const LayerSlice& s) const {
    return widen(geo.kept ? stored(thread.index, tensor, m, step) : read(geo, data(tensor) + base(m), s));
  }

  // Turns to another tile and fetches it to shared memory, if that is to keep it.
  CEN_DEVICE void fetch(const LayerTile<T, kLast>& other) {
    tile = other;
    buffer ^= 1;
    CEN_UNROLL_1
    for (int step = 0; geo.kept && step < geo.steps; ++step) {
      const LayerSlice s = slice(step);
      if (s.count == 0) break;
      CEN_UNROLL_1
      for (int m = 0; m < memory.modalities; ++m) {
        fetch_vector(kX, m, step, s);
        if (t.residual) fetch_vector(kResidual, m, step, s);
        if (kBackward) fetch_vector(kDy, m, step, s);
      }
    }
    commit_copies();
  }
  CEN_DEVICE void fetch_vector(Tensor tensor, int m, int step, const LayerSlice& s) const {
    Vec<T>& to = stored(thread.index, tensor, m, step);
    const T* from = data(tensor) + base(m);
    if (geo.vectors)
      copy_async16(&to, from + s.at);
    else
      to = read(geo, from, s);
  }

  // Records which of the thread's channels each modality lends to each, itself first of all.
  CEN_DEVICE void set_lent() const {
    constexpr int n = Memory::kChannels;
    CEN_UNROLL_1
    for (int m = 0; m < memory.modalities; ++m) {
      const int64_t begin = p.region_begin(m), end = p.region_end(m);
      CEN_UNROLL_1
      for (int step = 0; step < geo.steps; ++step) {
        // Any tile has the same channels; those past the last one stay.
        const LayerSlice s = slice(step);
        int32_t sources[n];
        uint8_t alone = 0;
        CEN_UNROLL
        for (int l = 0; l < n; ++l) {
          const int64_t c = s.channel + l * s.stride;
          sources[l] = c < p.channels ? route_of(p, t.weight, t.route, m, c, begin, end) : kOwn;
          alone |= (sources[l] >= 0) << l;
        }
        memory.alone_in(step, m, thread) = {alone};
        CEN_UNROLL_1
        for (int lender = 0; lender < memory.modalities; ++lender) {
          uint8_t bits = 0;
          CEN_UNROLL
          for (int l = 0; l < n; ++l)
            bits |= (lender == m ? sources[l] == kOwn : lends(sources[l], lender)) << l;
          memory.lent_to(step, m, lender, thread) = {bits};
        }
      }
    }
  }

  // Adds the part of v, which is of one modality, that belongs to another or to itself.
  CEN_DEVICE void add_share(Wide& sum, const Wide& v, int step, int borrower, int lender) const {
    const Lent<kLast> lent = memory.lent_to(step, borrower, lender, thread);
    if (borrower == lender && lent.bits == (1 << Memory::kChannels) - 1) {  // most vectors have no exchange
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) sum.element[l] += v.element[l];
      return;
    }
    const Lent<kLast> alone = memory.alone_in(step, borrower, thread);
    const R share = borrower == lender ? R(1) : R(1) / R(memory.modalities - 1);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) {
      const R part = alone.has(l) ? v.element[l] : v.element[l] * share;
      sum.element[l] += lent.has(l) ? part : R(0);
    }
  }

  // Values of a table [M, C] for the channels of a slice.
  CEN_DEVICE Wide of_channels(const R* table, int m, const LayerSlice& s) const {
    const R* from = table + m * p.channels + s.channel;
    Wide v{};
    if constexpr (!kLast) {
      const R value = *from;
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = value;
    } else if (geo.vectors) {
      constexpr int n = kVecSize<R>;
      CEN_UNROLL
      for (int k = 0; k < kVecSize<T>; k += n) {
        const Vec<R> part = load_vec(from + k);
        CEN_UNROLL
        for (int l = 0; l < n; ++l) v.element[k + l] = part.element[l];
      }
    } else {
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = s.has(l) ? from[l * s.stride] : R(0);
    }
    return v;
  }

  CEN_DEVICE Wide xhat(int m, int step, const LayerSlice& s) const {
    const LayerRow<R, Memory::kPositions>& row = memory.row(m, thread);
    const Row center = row.center, invstd = row.invstd;
    Row low{};  // of a mean that is given rounded, there is no more to know
    if (!kBackward) low = row.low;
    Wide v = read_wide(kX, m, step, s);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) {
      const int i = kLast ? 0 : l;
      v.element[l] = (v.element[l] - center.element[i]) * invstd.element[i] + low.element[i];
    }
    return v;
  }

  // Sets the rows of a tile from given statistics. Ends with a barrier.
  CEN_DEVICE void set_rows() const {
    sync_threads();
    CEN_UNROLL_1
    for (int m = thread.rank; m < memory.modalities; m += memory.team) {
      LayerRow<R, Memory::kPositions>& row = memory.row(m, thread);
      CEN_UNROLL
      for (int l = 0; l < Memory::kPositions; ++l) {
        if (l >= tile.positions) continue;
        const int64_t i = statistic(m, l);
        row.center.element[l] = t.mean[i];
        row.invstd.element[l] = 1 / std::sqrt(t.var[i] + R(p.eps));
        row.low.element[l] = R(0);
      }
    }
    sync_threads();
  }

  // The activation's argument.
  CEN_DEVICE Wide argument(int m, int step, const LayerSlice& s) const {
    Wide u{};
    CEN_UNROLL_1
    for (int lender = 0; lender < memory.modalities; ++lender) {
      if (memory.lent_to(step, m, lender, thread).bits == 0) continue;
      Wide z = xhat(lender, step, s);
      const Wide scale = of_channels(t.weight, lender, s), offset = of_channels(t.bias, lender, s);
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l)
        z.element[l] = z.element[l] * scale.element[l] + offset.element[l];
      add_share(u, z, step, m, lender);
    }
    if (!t.residual) return u;
    const Wide more = read_wide(kResidual, m, step, s);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) u.element[l] += more.element[l];
    return u;
  }
};

}  // namespace cen::cuda
