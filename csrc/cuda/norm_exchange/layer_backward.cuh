// The backward kernel of layer norm, which reads every tensor once where shared memory keeps it.
#pragma once

#include "layer.cuh"

namespace cen::cuda {

template <class T, bool kLast>
using LayerBackward = LayerWork<T, kLast, BackwardTensors<T>>;

// dy * activation'(u), which is the gradient of the residual.
template <class T, bool kLast>
CEN_DEVICE RealVec<T> gradient(const LayerBackward<T, kLast>& work, int m, int step, const LayerSlice& s) {
  const Problem& p = work.p;
  RealVec<T> g = work.read_wide(work.kDy, m, step, s);
  if (p.activation == Activation::identity) return g;
  const RealVec<T> u = work.argument(m, step, s);
  with_activation<Real<T>>(p, [&](auto activation) {
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) {
      if constexpr (decltype(activation)::kCurved)
        g.element[l] = activation.gradient(g.element[l], u.element[l]);
      else
        g.element[l] = activation.passes(u.element[l]) ? g.element[l] : activation.stopped(g.element[l]);
    }
  });
  return g;
}

// Calls f with the sums of the block, which are in shared memory or in device memory. (A choice of pointers
// would make all accesses generic ones.)
template <class T, bool kLast, class F>
CEN_DEVICE void with_sums(const LayerBackward<T, kLast>& work, const LayerSums<T, kLast>& scratch, F f) {
  if (work.geo.sums_kept)
    f(work.memory.sums);
  else
    f(LayerSums<T, kLast>{scratch.pieces + block_index() * scratch.size(work.p, work.geo)});
}

// What is done with a tile, one after the other, in one piece of code, since gradient() is long.
enum class LayerPass {
  activate,  // writes dresidual unless null, and lets gradient() take the place of dy if it is to
  sums,      // of weight * dz and of weight * dz * xhat over channels; of dz and of dz * xhat over positions
  dx,        // from the former
};

// `in_place`: after the first pass dy in shared memory has become gradient().
template <class T, bool kLast>
CEN_DEVICE void process(const LayerBackward<T, kLast>& work, const LayerSums<T, kLast>& scratch,
                        bool in_place, LayerPass pass) {
  using R = Real<T>;
  using Memory = LayerMemory<T, kLast>;
  using Row = typename Memory::Row;
  const Memory& memory = work.memory;
  const R part = work.p.batch_statistics ? R(1) / R(work.p.channels) : R(0);
  CEN_UNROLL_1
  for (int m = 0; m < memory.modalities; ++m) {
    Row constant{}, slope{};
    if (pass == LayerPass::dx) {
      constant = memory.total(0, m, work.thread);
      slope = memory.total(1, m, work.thread);
    }
    CEN_UNROLL_1
    for (int step = 0; step < work.geo.steps; ++step) {
      const LayerSlice s = work.slice(step);
      if (s.count == 0) break;
      // The gradient of z before the exchange: that of its own place, plus those of modalities that borrow
      // it.
      RealVec<T> dz{};
      const bool alone = pass == LayerPass::activate;
      CEN_UNROLL_1
      for (int borrower = alone ? m : 0; borrower < (alone ? m + 1 : memory.modalities); ++borrower) {
        if (!alone && memory.lent_to(step, borrower, m, work.thread).bits == 0) continue;
        const RealVec<T> g = in_place && !alone ? work.read_wide(work.kDy, borrower, step, s)
                                                : gradient(work, borrower, step, s);
        if (alone)
          dz = g;
        else
          work.add_share(dz, g, step, borrower, m);
      }
      if (alone) {
        const Vec<T> g = narrow<T>(dz);
        if (work.t.dresidual) write(work.geo, work.t.dresidual + work.base(m), s, g);
        if (in_place) work.stored(work.thread.index, work.kDy, m, step) = g;
        continue;
      }
      const RealVec<T> xhat = work.xhat(m, step, s), weight = work.of_channels(work.t.weight, m, s);
      if (pass == LayerPass::dx) {
        const Row invstd = memory.row(m, work.thread).invstd;
        CEN_UNROLL
        for (int l = 0; l < kVecSize<T>; ++l) {
          const int i = kLast ? 0 : l;
          dz.element[l] = (dz.element[l] * weight.element[l] -
                           (constant.element[i] + xhat.element[l] * slope.element[i]) * part) *
                          invstd.element[i];
        }
        write(work.geo, work.t.dx + work.base(m), s, narrow<T>(dz));
        continue;
      }
      RealVec<T> on_x;
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l) {
        dz.element[l] = s.has(l) ? dz.element[l] : R(0);
        on_x.element[l] = s.has(l) ? dz.element[l] * xhat.element[l] : R(0);
        constant.element[kLast ? 0 : l] += weight.element[l] * dz.element[l];
        slope.element[kLast ? 0 : l] += weight.element[l] * on_x.element[l];
      }
      with_sums(work, scratch, [&](const LayerSums<T, kLast>& sums) {
        const int row = m * work.geo.steps + step;
        sums.add(work.geo, row, work.thread.index, dz);
        sums.add(work.geo, row + memory.modalities * work.geo.steps, work.thread.index, on_x);
      });
    }
    if (pass != LayerPass::sums) continue;
    memory.give(0, m, work.thread, constant);
    memory.give(1, m, work.thread, slope);
  }
  if (pass == LayerPass::sums) memory.add_up(2, work.thread);
}

// Adds the sums of all places of the block, and stores them as those of one chunk of units without groups.
template <class T, bool kLast>
CEN_DEVICE void store_partials(const LayerBackward<T, kLast>& work, const LayerSums<T, kLast>& sums,
                               const PartialSums<Real<T>>& partials) {
  using R = Real<T>;
  const Problem& p = work.p;
  const LayerGeometry& geo = work.geo;
  const LayerThread<kLast>& thread = work.thread;
  constexpr int n = LayerMemory<T, kLast>::kChannels;
  const int64_t rows = p.modalities * geo.steps;
  for (int64_t row = thread.place; row < 2 * rows; row += geo.places) {
    const int64_t m = row % rows / geo.steps;
    const LayerSlice s = work.slice(int(row % geo.steps));
    R* to = (row < rows ? partials.dz : partials.on_x) + (block_index() * p.modalities + m) * p.channels;
    for (int l = 0; l < n; ++l) {
      const int64_t c = s.channel + l * s.stride;
      if (c >= p.channels) break;
      R sum = 0;
      for (int place = 0; place < geo.places; ++place) {
        const int other = place * thread.to_place + thread.rank * thread.to_next;
        sum += sums.piece(geo, row, l / sums.kPieceSize, other)[l % sums.kPieceSize];
      }
      to[c] = sum;
    }
  }
}

// `scratch` is for the sums of all blocks where shared memory has no room for them.
template <class T, bool kLast>
CEN_KERNEL void CEN_LAUNCH_BOUNDS(kLayerThreads, kLayerBackwardBlocks<T>)
    layer_backward(CEN_PARAMETER Problem p, CEN_PARAMETER LayerGeometry geo,
                   CEN_PARAMETER BackwardTensors<T> t, CEN_PARAMETER PartialSums<Real<T>> partials,
                   CEN_PARAMETER LayerSums<T, kLast> scratch, bool in_place) {
  const LayerThread<kLast> thread(geo);
  const LayerMemory<T, kLast> memory(shared_memory(), p, geo, LayerBackward<T, kLast>::tensors(t),
                                     geo.sums_kept);
  LayerBackward<T, kLast> next{p, geo, memory, thread, t};
  next.fetch({p, geo, thread, block_index()});
  next.set_lent();
  with_sums(next, scratch, [&](const auto& sums) { sums.clear(p, geo, thread.index); });
  CEN_UNROLL_1
  for (int64_t number = block_index(); number < geo.tiles; number += geo.blocks) {
    const LayerBackward<T, kLast> work = next;
    next.fetch({p, geo, thread, number + geo.blocks});
    wait_copies<1>();
    work.set_rows();
    const bool activates = p.activation != Activation::identity || t.dresidual;
    CEN_UNROLL_1
    for (int pass = activates ? 0 : 1; pass < 3; ++pass) process(work, scratch, in_place, LayerPass(pass));
  }
  with_sums(next, scratch, [&](const auto& sums) { store_partials(next, sums, partials); });
}

}  // namespace cen::cuda
