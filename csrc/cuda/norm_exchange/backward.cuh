// The backward kernels: one pass over memory if statistics are given or a strip fits in shared memory, else
// two.
#pragma once

#include "gradients.cuh"

namespace cen::cuda {

// The results of a pass: sums; dx, given the total sums; or both at once, with given statistics.
enum class Pass { sums, dx, both };

// Writes dx of a tile, adds the tile to the thread's sums, or both, depending on the pass.
template <class T, bool kLast>
CEN_DEVICE void process_tile(const Problem& p, const Geometry& geo, const BackwardTensors<T>& t,
                             const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                             const Tile& tile, Pass pass) {
  using R = Real<T>;
  constexpr int n = BackwardMemory<T, kLast>::kSums;
  CEN_UNROLL_1
  for (int m = 0; m < memory.table.modalities; ++m) {
    const Strip<T, kLast> strip(memory.table, m, coord.line);
    T* dx = t.dx + p.offset(m, coord.group);
    RealVec<T> dz_sum{}, on_x_sum{};
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) {
      const VectorSlice& slice = tile.slices[u];
      if (slice.empty()) continue;
      RealVec<T> dz = dz_of(p, memory, coord, strip, tile.storage_step + u);
      const RealVec<T> d = centered(memory, coord, strip, tile.storage_step + u);
      if (pass != Pass::dx) {
        CEN_UNROLL
        for (int l = 0; l < kVecSize<T>; ++l) {
          if (!slice.has(l)) continue;
          dz_sum.element[l] += dz.element[l];
          on_x_sum.element[l] += dz.element[l] * d.element[l];
        }
      }
      if (pass == Pass::sums) continue;
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) dz.element[l] *= strip.own.scale.element[l];
      if (pass == Pass::dx) {
        const RealVec<T> on_x = memory.table.row(kOnX, m, coord.line),
                         constant = memory.table.row(kConstant, m, coord.line);
        CEN_UNROLL
        for (int l = 0; l < kVecSize<T>; ++l)
          dz.element[l] += d.element[l] * on_x.element[l] + constant.element[l];
      }
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l)
        if (strip.flags.dead(l)) dz.element[l] = 0;
      write(geo, dx, slice, narrow<T>(dz));
    }
    if (pass == Pass::dx) continue;
    R* sums = memory.sums_of(coord, m) + coord.thread_rank;
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) {
      sums[(kLast ? l : 0) * coord.num_threads] += dz_sum.element[l];
      sums[(n + (kLast ? l : 0)) * coord.num_threads] += on_x_sum.element[l];
    }
  }
}

// Reduces the sums of all threads of the block to memory.dz and memory.on_x.
template <class T, bool kLast>
CEN_DEVICE void block_sums(const Problem& p, const BackwardMemory<T, kLast>& memory,
                           const ThreadCoord<kLast>& coord) {
  constexpr int n = BackwardMemory<T, kLast>::kSums;
  CEN_UNROLL_1
  for (int m = 0; m < p.modalities; ++m) {
    const Tree<Real<T>, kLast> tree{memory.sums_of(coord, m), coord};
    tree.run([&](int step) {
      CEN_UNROLL
      for (int value = 0; value < 2 * n; ++value) tree.at(value, 0) += tree.at(value, step);
    });
    if (coord.line_rank != 0) continue;
    for (int l = 0; l < n; ++l) {
      memory.dz[m * memory.table.width + coord.line * n + l] = tree.at(l, 0);
      memory.on_x[m * memory.table.width + coord.line * n + l] = tree.at(n + l, 0);
    }
  }
  sync_threads();
}

template <class T, bool kLast>
CEN_DEVICE void clear_sums(const Problem& p, const BackwardMemory<T, kLast>& memory,
                           const ThreadCoord<kLast>& coord) {
  const int values = int(p.modalities) * 2 * BackwardMemory<T, kLast>::kSums;
  for (int value = 0; value < values; ++value) memory.sums[value * coord.num_threads + coord.thread_rank] = 0;
}

template <class T, bool kLast>
CEN_DEVICE void store_partials(const Problem& p, const BackwardMemory<T, kLast>& memory,
                               const ThreadCoord<kLast>& coord, const PartialSums<Real<T>>& partials) {
  memory.table.each(p, coord, [&](int m, int64_t c, int w) {
    const int64_t i = partials.index(p, coord.chunk, p.unit(m, coord.group), c);
    partials.dz[i] = memory.dz[m * memory.table.width + w];
    partials.on_x[i] = memory.on_x[m * memory.table.width + w];
  });
}

template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kTwoPassThreads, kBackwardBlocks)
    two_pass_backward(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER BackwardTensors<T> t,
                      CEN_PARAMETER PartialSums<Real<T>> partials, Pass pass) {
  const ThreadCoord<kLast> coord(p, geo);
  const BackwardMemory<T, kLast> memory(shared_memory(), p, geo, t.residual != nullptr, kTwoPassSteps, false);
  memory.table.set_flags(p, coord, t.weight, t.route, pass == Pass::dx && p.joined > 1 ? 0 : kDead);
  set_affine(p, coord, memory.table, t);
  if (pass == Pass::dx)
    set_gradient(p, coord, memory.table, t, [&](int m, int64_t c, int) {
      return partials.at(p, 0, p.unit(m, coord.group), c / p.joined * p.joined);
    });
  clear_sums(p, memory, coord);
  sync_threads();
  const int steps = coord.steps(geo);
  Tile next(p, geo, coord, 0, 0);
  fetch_backward(p, geo, t, memory, coord, next);
  commit_copies();
  CEN_UNROLL_1
  for (int step = 0; step < steps; step += kTile) {
    const Tile tile = next;
    next = Tile(p, geo, coord, step + kTile, kTile - tile.storage_step);
    fetch_backward(p, geo, t, memory, coord, next);
    commit_copies();
    wait_copies<1>();
    activate(p, geo, t, memory, coord, tile);
    process_tile(p, geo, t, memory, coord, tile, pass);
  }
  if (pass == Pass::dx) return;
  block_sums(p, memory, coord);
  store_partials(p, memory, coord, partials);
}

// The whole backward pass, which reads every tensor once: the blocks of a strip keep it in shared memory, as
// in resident_forward.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kResidentThreads, 1)
    resident_backward(CEN_PARAMETER Problem p, CEN_PARAMETER Geometry geo, CEN_PARAMETER BackwardTensors<T> t,
                      CEN_PARAMETER PartialSums<Real<T>> partials, bool through_device) {
  const ThreadCoord<kLast> coord(p, geo);
  const int steps = coord.steps(geo);
  const BackwardMemory<T, kLast> memory(shared_memory(), p, geo, t.residual != nullptr, steps, p.joined > 1);
  memory.table.set_flags(p, coord, t.weight, t.route, p.joined > 1 ? 0 : kDead);
  sync_threads();
  for (int step = 0; step < steps; step += kTile)
    fetch_backward(p, geo, t, memory, coord, Tile(p, geo, coord, step, step));
  commit_copies();
  set_affine(p, coord, memory.table, t);
  clear_sums(p, memory, coord);
  sync_threads();
  wait_copies<0>();
  CEN_UNROLL_1
  for (int step = 0; step < steps; step += kTile) {
    const Tile tile(p, geo, coord, step, step);
    activate(p, geo, t, memory, coord, tile);
    process_tile(p, geo, t, memory, coord, tile, Pass::sums);
  }
  block_sums(p, memory, coord);
  if (through_device || p.groups > 1) store_partials(p, memory, coord, partials);
  if (through_device)
    grid_sync();
  else
    cluster_sync();
  const int width = memory.table.width;
  const auto of_channel = [&](int m, int64_t c, int w) {
    const Sums sums = add_chunks(geo.chunks, 0, 1, [&](int64_t k) {
      if (through_device) return partials.at(p, k, p.unit(m, coord.group), c);
      return Sums{double(of_rank(memory.dz, int(k))[m * width + w]),
                  double(of_rank(memory.on_x, int(k))[m * width + w])};
    });
    if (coord.chunk == 0 && p.groups == 1) store_sums(p, t, m, c, sums);
    return sums;
  };
  if (p.joined > 1) {
    memory.table.each(p, coord, [&](int m, int64_t c, int w) {
      memory.channels[m * width + w] = scaled(memory.table.at(kScale, m, w), of_channel(m, c, w));
    });
    sync_threads();
  }
  set_gradient(p, coord, memory.table, t, [&](int m, int64_t c, int w) {
    if (p.joined == 1) return of_channel(m, c, w);
    const int joined = int(p.joined), first = m * width + w / joined * joined;
    return add_chunks(joined, 0, 1, [&](int64_t i) { return memory.channels[first + i]; });
  });
  // No block of a cluster may exit before the others have read its sums.
  if (through_device)
    sync_threads();
  else
    cluster_sync();
  CEN_UNROLL_1
  for (int step = 0; step < steps; step += kTile)
    process_tile(p, geo, t, memory, coord, Tile(p, geo, coord, step, step), Pass::dx);
}

// Reduces the partial sums over chunks and groups to dweight and dbias. The sums of a unit overwrite those of
// its first chunk, where two_pass_backward reads them.
template <class T>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kFinishChannels* kFinishThreads, 1)
    finish_sums(CEN_PARAMETER Problem p, int64_t chunks, CEN_PARAMETER BackwardTensors<T> t,
                CEN_PARAMETER PartialSums<Real<T>> partials) {
  const FinishCoord coord(p);
  const bool exists = coord.c < p.channels, first = exists && coord.rank == 0;
  double dweight = 0, dbias = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t unit = p.unit(coord.m, g);
    Sums sums{};
    if (exists)
      sums = add_chunks(chunks, coord.rank, kFinishThreads,
                        [&](int64_t k) { return partials.at(p, k, unit, coord.c); });
    coord.add(sums.dz, sums.on_x);
    if (!first) continue;
    const int64_t i = partials.index(p, 0, unit, coord.c);
    partials.dz[i] = Real<T>(sums.dz);
    partials.on_x[i] = Real<T>(sums.on_x);
    dweight += weight_gradient(p, t, unit, coord.c, sums);
    dbias += sums.dz;
  }
  if (!first) return;
  t.dweight[coord.m * p.channels + coord.c] = Real<T>(dweight);
  t.dbias[coord.m * p.channels + coord.c] = Real<T>(dbias);
}

// Joins the sums that finish_sums left of the channels which share statistics, as set_gradient() needs them,
// in the place of the first.
template <class T>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kFinishChannels* kFinishThreads, 1)
    join_sums(CEN_PARAMETER Problem p, CEN_PARAMETER BackwardTensors<T> t,
              CEN_PARAMETER PartialSums<Real<T>> partials) {
  const JoinCoord coord(p);
  const int64_t m = coord.unit / p.groups;
  const int first = coord.rank * kFinishChannels + coord.column;
  Sums sums = add_chunks(p.joined, first, kFinishChannels * kFinishThreads, [&](int64_t i) {
    const int64_t c = coord.begin + i;
    return scaled(t.weight[m * p.channels + c], partials.at(p, 0, coord.unit, c));
  });
  coord.add_all(sums.dz, sums.on_x);
  if (first != 0) return;
  sums = scaled(1 / std::sqrt(double(t.var[coord.statistic]) + p.eps), sums);
  const int64_t i = partials.index(p, 0, coord.unit, coord.begin);
  partials.dz[i] = Real<T>(sums.dz);
  partials.on_x[i] = Real<T>(sums.on_x);
}

}  // namespace cen::cuda
