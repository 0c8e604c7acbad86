// The forward kernel of layer norm, which reads x once where shared memory keeps it.
#pragma once

#include "layer.cuh"

namespace cen::cuda {

template <class T, bool kLast>
using LayerForward = LayerWork<T, kLast, ForwardTensors<T>>;

// Calls f(i, x) for the thread's values of a modality, i being the position's index in a row.
template <class T, bool kLast, class F>
CEN_DEVICE void each_value(const LayerForward<T, kLast>& work, int m, F f) {
  CEN_UNROLL_1
  for (int step = 0; step < work.geo.steps; ++step) {
    const LayerSlice s = work.slice(step);
    if (s.count == 0) break;
    const RealVec<T> x = work.read_wide(work.kX, m, step, s);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l)
      if (s.has(l)) f(kLast ? 0 : l, x.element[l]);
  }
}

// The values of the first channel. A team's threads may all read what its first one has fetched.
template <class T, bool kLast>
CEN_DEVICE typename LayerMemory<T, kLast>::Row first_values(const LayerForward<T, kLast>& work, int m) {
  typename LayerMemory<T, kLast>::Row row{};
  const auto& tile = work.tile;
  if (tile.positions == 0) return row;
  const LayerSlice first{tile.position * (kLast ? work.p.channels : 1), 0, tile.stride, tile.positions};
  const Vec<T> x = work.geo.kept ? work.stored(work.thread.first, work.kX, m, 0)
                                 : read(work.geo, work.t.x + work.base(m), first);
  CEN_UNROLL
  for (int l = 0; l < LayerMemory<T, kLast>::kPositions; ++l) row.element[l] = to_real(x.element[l]);
  return row;
}

// Sets the rows of a tile, and batch_mean and batch_var, from the values of x: first their mean, by
// deviations from the first value, then by deviations from that the variance and what the mean lacks in
// digits. Every term is divided by C before it is added, so that no sum exceeds its result. Ends with a
// barrier.
template <class T, bool kLast>
CEN_DEVICE void compute_rows(const LayerForward<T, kLast>& work) {
  using R = Real<T>;
  using Memory = LayerMemory<T, kLast>;
  using Row = typename Memory::Row;
  const Memory& memory = work.memory;
  const auto& thread = work.thread;
  const R part = R(1) / R(work.p.channels);
  sync_threads();  // first_values() is another thread's
  CEN_UNROLL_1
  for (int m = 0; m < memory.modalities; ++m) {
    const Row first = first_values(work, m);
    Row sum{};
    each_value(work, m, [&](int i, R x) { sum.element[i] += (x - first.element[i]) * part; });
    memory.give(0, m, thread, sum);
  }
  memory.add_up(1, thread);
  CEN_UNROLL_1
  for (int m = 0; m < memory.modalities; ++m) {
    Row center = first_values(work, m), moved{}, squares{};
    const Row total = memory.total(0, m, thread);
    CEN_UNROLL
    for (int l = 0; l < Memory::kPositions; ++l) center.element[l] += total.element[l];
    if (thread.rank == 0) memory.row(m, thread).center = center;
    each_value(work, m, [&](int i, R x) {
      const R d = x - center.element[i];
      moved.element[i] += d * part;
      squares.element[i] += d * (d * part);
    });
    memory.give(0, m, thread, moved);
    memory.give(1, m, thread, squares);
  }
  memory.add_up(2, thread);
  CEN_UNROLL_1
  for (int m = thread.rank; m < memory.modalities; m += memory.team) {
    LayerRow<R, Memory::kPositions>& row = memory.row(m, thread);
    const Row center = row.center, moved = memory.total(0, m, thread), squares = memory.total(1, m, thread);
    CEN_UNROLL
    for (int l = 0; l < Memory::kPositions; ++l) {
      if (l >= work.tile.positions) continue;
      const double exact = double(center.element[l]) + double(moved.element[l]);
      const R mean = R(exact), spread = squares.element[l] - moved.element[l] * moved.element[l],
              var = spread < 0 ? R(0) : spread, invstd = 1 / std::sqrt(var + R(work.p.eps));
      row.center.element[l] = mean;
      row.invstd.element[l] = invstd;
      row.low.element[l] = R(double(mean) - exact) * invstd;
      work.t.batch_mean[work.statistic(m, l)] = mean;
      work.t.batch_var[work.statistic(m, l)] = var;
    }
  }
  sync_threads();
}

template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kLayerThreads, kLayerForwardBlocks<T>)
    layer_forward(CEN_PARAMETER Problem p, CEN_PARAMETER LayerGeometry geo,
                  CEN_PARAMETER ForwardTensors<T> t) {
  const LayerThread<kLast> thread(geo);
  const LayerMemory<T, kLast> memory(shared_memory(), p, geo, LayerForward<T, kLast>::tensors(t), false);
  LayerForward<T, kLast> next{p, geo, memory, thread, t};
  next.fetch({p, geo, thread, block_index()});
  next.set_lent();
  CEN_UNROLL_1
  for (int64_t number = block_index(); number < geo.tiles; number += geo.blocks) {
    const LayerForward<T, kLast> work = next;
    next.fetch({p, geo, thread, number + geo.blocks});
    wait_copies<1>();
    if (t.mean)
      work.set_rows();
    else
      compute_rows(work);
    CEN_UNROLL_1
    for (int step = 0; step < geo.steps; ++step) {
      const LayerSlice s = work.slice(step);
      if (s.count == 0) break;
      CEN_UNROLL_1
      for (int m = 0; m < memory.modalities; ++m) {
        RealVec<T> v = work.argument(m, step, s);
        with_activation<Real<T>>(p, [&](auto activate) {
          CEN_UNROLL
          for (int l = 0; l < kVecSize<T>; ++l) v.element[l] = activate.value(v.element[l]);
        });
        write(geo, t.y + work.base(m), s, narrow<T>(v));
      }
    }
  }
}

}  // namespace cen::cuda
