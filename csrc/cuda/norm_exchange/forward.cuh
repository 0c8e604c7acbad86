// The forward kernels: one pass over memory if statistics are given or a strip fits in shared memory, else
// two.
#pragma once

#include "exchange.cuh"

namespace cen::cuda {

// Mean and variance per chunk, in device memory: [chunks][units][C] each.
struct Partials {
  double *mean, *var;

  CEN_DEVICE int64_t index(const Problem& p, int64_t chunk, int64_t unit, int64_t c) const {
    return (chunk * p.units() + unit) * p.channels + c;
  }
  CEN_DEVICE MeanVar at(const Problem& p, int64_t chunk, int64_t unit, int64_t c) const {
    const int64_t i = index(p, chunk, unit, c);
    return {mean[i], var[i]};
  }
};

// Steps in shared memory under the two-pass plan: double buffering of tiles.
constexpr int kTwoPassSteps = 2 * kTile;

// Vectors in shared memory, private to each thread: [steps][tensors][M][threads].
template <class T>
struct Storage {
  int tensors, modalities, threads;
  Vec<T>* vectors;

  CEN_HOST_DEVICE Storage(SharedAllocator& allocator, const Problem& p, int threads, int tensors,
                          int64_t steps)
      : tensors(tensors), modalities(int(p.modalities)), threads(threads) {
    vectors = allocator.alloc<Vec<T>>(steps * tensors * modalities * threads);
  }
  CEN_DEVICE Vec<T>& at(int thread, int step, int tensor, int m) const {
    return vectors[((step * tensors + tensor) * modalities + m) * threads + thread];
  }
};

// The shared memory of a forward block.
template <class T, bool kLast>
struct ForwardMemory {
  enum Tensor { kX, kResidual };

  SharedAllocator allocator;
  Table<T, kLast> table;
  Storage<T> storage;

  CEN_HOST_DEVICE ForwardMemory(void* shared, const Problem& p, const Geometry& geo, bool residual,
                                int64_t steps)
      : allocator{static_cast<char*>(shared)},
        table(allocator, p, geo, kForwardCoefficients),
        storage(allocator, p, geo.threads(), residual ? 2 : 1, steps) {}
};

// The shared memory of a block of statistics_kernel.
template <class T, bool kLast>
struct StatisticsMemory {
  SharedAllocator allocator;
  char* workspace;
  int* overflow;
  double *mean, *var;  // [width]

  CEN_HOST_DEVICE StatisticsMemory(void* shared, const Geometry& geo)
      : allocator{static_cast<char*>(shared)} {
    const int width = Table<T, kLast>::width_of(geo);
    workspace = allocator.alloc<char>(geo.threads_x * geo.threads_y * moments_workspace<T>(kLast));
    overflow = allocator.alloc<int>(1);
    mean = allocator.alloc<double>(width);
    var = allocator.alloc<double>(width);
  }
};

// The shared memory of a block of resident_forward, which computes statistics, too.
template <class T, bool kLast>
struct ResidentForwardMemory : ForwardMemory<T, kLast> {
  char* workspace;
  int* overflow;       // [M]
  double *mean, *var;  // [M][width], over this block's values
  MeanVar* channels;   // [M][width], over those of all blocks, where channels are to be joined

  CEN_HOST_DEVICE ResidentForwardMemory(void* shared, const Problem& p, const Geometry& geo, bool residual,
                                        int64_t steps)
      : ForwardMemory<T, kLast>(shared, p, geo, residual, steps) {
    SharedAllocator& allocator = this->allocator;
    workspace = allocator.template alloc<char>(geo.threads_x * geo.threads_y * moments_workspace<T>(kLast));
    overflow = allocator.template alloc<int>(p.modalities);
    mean = allocator.template alloc<double>(p.modalities * this->table.width);
    var = allocator.template alloc<double>(p.modalities * this->table.width);
    channels = allocator.template alloc<MeanVar>(p.joined > 1 ? p.modalities * this->table.width : 0);
  }
};

// Sets the coefficients of z from the moments that of(m, c, w) returns.
template <class T, bool kLast, class Of>
CEN_DEVICE void set_affine(const Problem& p, const ThreadCoord<kLast>& coord, const Table<T, kLast>& table,
                           const Real<T>* weight, const Real<T>* bias, Of of) {
  using R = Real<T>;
  table.each(p, coord, [&](int m, int64_t c, int w) {
    const MeanVar s = of(m, c, w);
    const R shift = R(s.mean), scale = weight[m * p.channels + c] / std::sqrt(R(s.var) + R(p.eps));
    table.at(kShift, m, w) = shift;
    table.at(kScale, m, w) = scale;
    table.at(kOffset, m, w) = bias[m * p.channels + c] - R(s.mean - double(shift)) * scale;
  });
}

template <class T>
CEN_DEVICE void update_running(const Problem& p, const ForwardTensors<T>& t, int64_t i, double mean,
                               double var) {
  const auto update = [&](Real<T>& running, double value) {
    running = Real<T>(running + p.momentum * (value - running));
  };
  update(t.running_mean[i], mean);
  update(t.running_var[i], var * p.unbiased());
}

// Fetches the vectors of a tile: those of x that y depends on, or all of x, and those of the residual.
template <class T, bool kLast>
CEN_DEVICE void fetch_forward(const Problem& p, const Geometry& geo, const ForwardTensors<T>& t,
                              const ForwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                              bool all, const Tile& tile) {
  using Memory = ForwardMemory<T, kLast>;
  CEN_UNROLL_1
  for (int m = 0; m < memory.table.modalities; ++m) {
    const int64_t base = p.offset(m, coord.group);
    const bool part = all || !memory.table.flags_of(m, coord.line).all(kDead);
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) {
      const VectorSlice& slice = tile.slices[u];
      if (slice.empty()) continue;
      if (part)
        fetch(geo, &memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kX, m), t.x + base,
              slice);
      if (t.residual)
        fetch(geo, &memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kResidual, m),
              t.residual + base, slice);
    }
  }
}

// Writes y for a tile in shared memory.
template <class T, bool kLast>
CEN_DEVICE void write_y(const Problem& p, const Geometry& geo, const ForwardTensors<T>& t,
                        const ForwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                        const Tile& tile) {
  using Memory = ForwardMemory<T, kLast>;
  CEN_UNROLL_1
  for (int m = 0; m < memory.table.modalities; ++m) {
    const Strip<T, kLast> strip(memory.table, m, coord.line);
    T* y = t.y + p.offset(m, coord.group);
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) {
      const VectorSlice& slice = tile.slices[u];
      if (slice.empty()) continue;
      RealVec<T> v = strip.exchanged([&](int modality) {
        return widen(memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kX, modality));
      });
      if (t.residual) {
        const RealVec<T> residual =
            widen(memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kResidual, m));
        CEN_UNROLL
        for (int l = 0; l < kVecSize<T>; ++l) v.element[l] += residual.element[l];
      }
      with_activation<Real<T>>(p, [&](auto activate) {
        CEN_UNROLL
        for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = activate.value(v.element[l]);
      });
      write(geo, y, slice, narrow<T>(v));
    }
  }
}

// The first of two passes: the statistics of a chunk. Every unit is a group here, as if M = 1.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kTwoPassThreads, (kForwardBlocks<T, kLast>))
    statistics_kernel(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, const T* x,
                      CEN_PARAMETER Partials partials) {
  const ThreadCoord<kLast> coord(p, geo);
  const StatisticsMemory<T, kLast> memory(shared_memory(), geo);
  if (coord.thread_rank == 0) *memory.overflow = 0;
  const int64_t unit = coord.group;
  const T* base = x + p.offset(unit / p.groups, unit % p.groups);
  block_moments<T>(p, geo, coord, memory.workspace, memory.overflow, memory.mean, memory.var,
                   [&](int, const VectorSlice& slice) { return read(geo, base, slice); });
  const int width = Table<T, kLast>::width_of(geo);
  for (int w = coord.thread_rank; w < width; w += coord.num_threads) {
    const int64_t c = coord.strip * width + w;
    if (c >= p.channels) break;
    const int64_t i = partials.index(p, coord.chunk, unit, c);
    partials.mean[i] = memory.mean[w];
    partials.var[i] = memory.var[w];
  }
}

// Reduces the partials of statistics_kernel to batch_mean and batch_var, then updates the running statistics,
// with the average over groups for instance norm. After resident_forward partials are null and only the
// update remains.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kFinishChannels* kFinishThreads, 1)
    finish_statistics(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER ForwardTensors<T> t,
                      CEN_PARAMETER Partials partials) {
  const FinishCoord coord(p);
  const bool exists = coord.c < p.channels, first = exists && coord.rank == 0;
  double mean = 0, var = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t unit = p.unit(coord.m, g), i = unit * p.channels + coord.c;
    if (partials.mean) {
      ChunkSums sums{exists ? partials.at(p, 0, unit, coord.c).mean : 0};
      if (exists)
        sums.add<kLast>(p, geo, coord.c, coord.rank, kFinishThreads,
                        [&](int64_t k) { return partials.at(p, k, unit, coord.c); });
      coord.add(sums.mean, sums.square);
      if (!first) continue;
      const MeanVar s = sums.joined();
      t.batch_mean[i] = Real<T>(s.mean);
      t.batch_var[i] = Real<T>(s.var);
    }
    if (!first) continue;
    mean += t.batch_mean[i];
    var += t.batch_var[i];
  }
  if (first && t.running_mean)
    update_running(p, t, coord.m * p.channels + coord.c, mean / p.groups, var / p.groups);
}

// The same where channels share statistics, of which there are no running ones.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kFinishChannels* kFinishThreads, 1)
    join_statistics(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER ForwardTensors<T> t,
                    CEN_PARAMETER Partials partials) {
  const JoinCoord coord(p);
  ChunkSums sums{partials.at(p, 0, coord.unit, coord.begin).mean};
  for (int64_t c = coord.begin + coord.column; c < coord.end; c += kFinishChannels)
    sums.add<kLast>(p, geo, c, coord.rank, kFinishThreads,
                    [&](int64_t k) { return partials.at(p, k, coord.unit, c); });
  coord.add_all(sums.mean, sums.square);
  if (coord.rank != 0 || coord.column != 0) return;
  sums.mean /= double(p.joined);
  sums.square /= double(p.joined);
  const MeanVar s = sums.joined();
  t.batch_mean[coord.statistic] = Real<T>(s.mean);
  t.batch_var[coord.statistic] = Real<T>(s.var);
}

// Writes y from given statistics; also the second of two passes.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kTwoPassThreads, (kForwardBlocks<T, kLast>))
    two_pass_forward(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER ForwardTensors<T> t) {
  const ThreadCoord<kLast> coord(p, geo);
  const ForwardMemory<T, kLast> memory(shared_memory(), p, geo, t.residual != nullptr, kTwoPassSteps);
  memory.table.set_flags(p, coord, t.weight, t.route);
  set_affine(p, coord, memory.table, t.weight, t.bias, [&](int m, int64_t c, int) {
    const int64_t i = p.statistic(p.unit(m, coord.group), c);
    return MeanVar{double(t.mean[i]), double(t.var[i])};
  });
  sync_threads();
  const int steps = coord.steps(geo);
  Tile next(p, geo, coord, 0, 0);
  fetch_forward(p, geo, t, memory, coord, false, next);
  commit_copies();
  CEN_UNROLL_1
  for (int step = 0; step < steps; step += kTile) {
    const Tile tile = next;
    next = Tile(p, geo, coord, step + kTile, kTile - tile.storage_step);
    fetch_forward(p, geo, t, memory, coord, false, next);
    commit_copies();
    wait_copies<1>();
    write_y(p, geo, t, memory, coord, tile);
  }
}

// Writes batch statistics and y and reads x once: the blocks of a strip, in a cluster or a cooperative
// launch, keep it in shared memory.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kResidentThreads, 1)
    resident_forward(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER ForwardTensors<T> t,
                     CEN_PARAMETER Partials partials) {
  using Memory = ForwardMemory<T, kLast>;
  const ThreadCoord<kLast> coord(p, geo);
  const int steps = coord.steps(geo);
  const ResidentForwardMemory<T, kLast> memory(shared_memory(), p, geo, t.residual != nullptr, steps);
  for (int step = 0; step < steps; step += kTile)
    fetch_forward<T, kLast>(p, geo, t, memory, coord, true, Tile(p, geo, coord, step, step));
  commit_copies();
  const int width = memory.table.width;
  for (int m = coord.thread_rank; m < p.modalities; m += coord.num_threads) memory.overflow[m] = 0;
  memory.table.set_flags(p, coord, t.weight, t.route);
  sync_threads();
  wait_copies<0>();
  CEN_UNROLL_1
  for (int m = 0; m < p.modalities; ++m)
    block_moments<T>(p, geo, coord, memory.workspace, memory.overflow + m, memory.mean + m * width,
                     memory.var + m * width, [&](int step, const VectorSlice&) {
                       return memory.storage.at(coord.thread_rank, step, Memory::kX, m);
                     });
  // The blocks of a strip exchange their moments through distributed shared memory (clusters) or through
  // device memory (grids).
  const bool through_device = partials.mean != nullptr;
  if (through_device) {
    memory.table.each(p, coord, [&](int m, int64_t c, int w) {
      const int64_t i = partials.index(p, coord.chunk, p.unit(m, coord.group), c);
      partials.mean[i] = memory.mean[m * width + w];
      partials.var[i] = memory.var[m * width + w];
    });
    grid_sync();
  } else {
    cluster_sync();
  }
  const auto of_channel = [&](int m, int64_t c, int w) {
    return join_chunks<kLast>(p, geo, c, [&](int64_t k) {
      if (through_device) return partials.at(p, k, p.unit(m, coord.group), c);
      return MeanVar{of_rank(memory.mean, int(k))[m * width + w], of_rank(memory.var, int(k))[m * width + w]};
    });
  };
  if (p.joined > 1) {
    memory.table.each(p, coord,
                      [&](int m, int64_t c, int w) { memory.channels[m * width + w] = of_channel(m, c, w); });
    sync_threads();
  }
  set_affine(p, coord, memory.table, t.weight, t.bias, [&](int m, int64_t c, int w) {
    const int joined = int(p.joined), first = m * width + w / joined * joined;
    const MeanVar s = joined > 1
                          ? join_channels(joined, [&](int64_t i) { return memory.channels[first + i]; })
                          : of_channel(m, c, w);
    if (coord.chunk == 0 && w % joined == 0) {
      const int64_t i = p.statistic(p.unit(m, coord.group), c);
      t.batch_mean[i] = Real<T>(s.mean);
      t.batch_var[i] = Real<T>(s.var);
      if (t.running_mean && p.groups == 1) update_running(p, t, i, s.mean, s.var);  // else finish_statistics
    }
    return s;
  });
  // No block of a cluster may exit before the others have read its moments.
  if (through_device)
    sync_threads();
  else
    cluster_sync();
  CEN_UNROLL_1
  for (int step = 0; step < steps; step += kTile)
    write_y<T, kLast>(p, geo, t, memory, coord, Tile(p, geo, coord, step, step));
}

}  // namespace cen::cuda
