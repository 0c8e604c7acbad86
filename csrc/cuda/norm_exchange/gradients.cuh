// The shared memory of the backward kernels, and the gradients of a single vector: behind the activation, and
// of z before the exchange.
#pragma once

#include "forward.cuh"

namespace cen::cuda {

// The sums of dz and of dz * (x - mean) over a channel; with layer norm, of dz * xhat.
struct Sums {
  double dz, on_x;
};

// Sums per chunk, in device memory: [chunks][units][C] each.
template <class R>
struct PartialSums {
  R *dz, *on_x;

  CEN_DEVICE int64_t index(const Problem& p, int64_t chunk, int64_t unit, int64_t c) const {
    return (chunk * p.units() + unit) * p.channels + c;
  }
  CEN_DEVICE Sums at(const Problem& p, int64_t chunk, int64_t unit, int64_t c) const {
    const int64_t i = index(p, chunk, unit, c);
    return {double(dz[i]), double(on_x[i])};
  }
};

// Adds the chunks first, first + step, …; of_chunk(k) returns the sums of chunk k.
template <class OfChunk>
CEN_DEVICE Sums add_chunks(int64_t chunks, int64_t first, int64_t step, OfChunk of_chunk) {
  Sums sums{};
  CEN_UNROLL_4
  for (int64_t k = first; k < chunks; k += step) {
    const Sums chunk = of_chunk(k);
    sums.dz += chunk.dz;
    sums.on_x += chunk.on_x;
  }
  return sums;
}

// The shared memory of a backward block.
template <class T, bool kLast>
struct BackwardMemory {
  enum Tensor { kDy, kX, kResidual };
  static constexpr int kSums = kLast ? kVecSize<T> : 1;  // channels per thread

  SharedAllocator allocator;
  Table<T, kLast> table;
  Storage<T> storage;
  uint8_t* passes;    // [steps][M][threads], a bit per value: whether the activation's derivative is 1
  Real<T>* sums;      // [M][2 * kSums][threads]
  Real<T>*dz, *on_x;  // [M][width], over this block's values
  Sums* channels;     // [M][width], over those of all blocks, where a resident block joins channels

  CEN_HOST_DEVICE BackwardMemory(void* shared, const Problem& p, const Geometry& geo, bool residual,
                                 int64_t steps, bool joins)
      : allocator{static_cast<char*>(shared)},
        table(allocator, p, geo, kBackwardCoefficients),
        storage(allocator, p, geo.threads(), residual ? 3 : 2, steps) {
    passes = allocator.alloc<uint8_t>(steps * p.modalities * storage.threads);
    sums = allocator.alloc<Real<T>>(p.modalities * 2 * kSums * storage.threads);
    dz = allocator.alloc<Real<T>>(p.modalities * table.width);
    on_x = allocator.alloc<Real<T>>(p.modalities * table.width);
    channels = allocator.alloc<Sums>(joins ? p.modalities * table.width : 0);
  }

  CEN_DEVICE uint8_t& passes_at(const ThreadCoord<kLast>& coord, int step, int m) const {
    return passes[(step * table.modalities + m) * coord.num_threads + coord.thread_rank];
  }
  CEN_DEVICE Real<T>* sums_of(const ThreadCoord<kLast>& coord, int m) const {
    return sums + m * 2 * kSums * coord.num_threads;
  }
};

// Sets the coefficients of z. In the backward pass mean has the precision of x already.
template <class T, bool kLast>
CEN_DEVICE void set_affine(const Problem& p, const ThreadCoord<kLast>& coord, const Table<T, kLast>& table,
                           const BackwardTensors<T>& t) {
  set_affine(p, coord, table, t.weight, t.bias, [&](int m, int64_t c, int) {
    const int64_t i = p.statistic(p.unit(m, coord.group), c);
    return MeanVar{double(t.mean[i]), double(t.var[i])};
  });
}

// Sets the coefficients of dx from the sums that of(m, c, w) returns: those over a whole channel, or over all
// channels that share its statistics, each scaled by weight / sqrt(var + eps).
template <class T, bool kLast, class Of>
CEN_DEVICE void set_gradient(const Problem& p, const ThreadCoord<kLast>& coord, const Table<T, kLast>& table,
                             const BackwardTensors<T>& t, Of of) {
  using R = Real<T>;
  table.each(p, coord, [&](int m, int64_t c, int w) {
    const Sums sums = of(m, c, w);
    const double var = t.var[p.statistic(p.unit(m, coord.group), c)];
    const double scale = p.joined > 1 ? 1 : double(table.at(kScale, m, w));
    const int64_t values = p.joined * p.values();
    table.at(kOnX, m, w) = R(-scale * (sums.on_x / (var + p.eps)) / values);
    table.at(kConstant, m, w) = R(-scale * sums.dz / values);
  });
}

CEN_DEVICE Sums scaled(double scale, Sums sums) { return {scale * sums.dz, scale * sums.on_x}; }

// The contribution of a channel of a unit to dweight. If y does not depend on x, var may be anything, even
// NaN, and so may the sums where statistics are shared, which need x all the same. With layer norm var
// differs from position to position, and is in the sums already.
template <class T>
CEN_DEVICE double weight_gradient(const Problem& p, const BackwardTensors<T>& t, int64_t unit, int64_t c,
                                  Sums sums) {
  if (p.across_channels() && is_unread(p, t.weight, t.route, unit / p.groups, c)) return 0;
  if (sums.on_x == 0 || p.norm == Norm::layer) return sums.on_x;
  return sums.on_x / std::sqrt(double(t.var[p.statistic(unit, c)]) + p.eps);
}

// Writes dweight and dbias of a modality of one unit.
template <class T>
CEN_DEVICE void store_sums(const Problem& p, const BackwardTensors<T>& t, int64_t m, int64_t c, Sums sums) {
  const int64_t i = m * p.channels + c;
  t.dbias[i] = Real<T>(sums.dz);
  t.dweight[i] = Real<T>(weight_gradient(p, t, m, c, sums));
}

// Fetches the vectors of a tile: dy, x unless y does not depend on it, and the residual unless null.
template <class T, bool kLast>
CEN_DEVICE void fetch_backward(const Problem& p, const Geometry& geo, const BackwardTensors<T>& t,
                               const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                               const Tile& tile) {
  using Memory = BackwardMemory<T, kLast>;
  CEN_UNROLL_1
  for (int m = 0; m < memory.table.modalities; ++m) {
    const int64_t base = p.offset(m, coord.group);
    const bool part = !memory.table.flags_of(m, coord.line).all(kDead);
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) {
      const VectorSlice& slice = tile.slices[u];
      if (slice.empty()) continue;
      fetch(geo, &memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kDy, m), t.dy + base,
            slice);
      if (part)
        fetch(geo, &memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kX, m), t.x + base,
              slice);
      if (t.residual)
        fetch(geo, &memory.storage.at(coord.thread_rank, tile.storage_step + u, Memory::kResidual, m),
              t.residual + base, slice);
    }
  }
}

// The argument u of the activation: z after the exchange, plus the residual.
template <class T, bool kLast>
CEN_DEVICE RealVec<T> argument(const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                               const Strip<T, kLast>& strip, int storage_step) {
  using Memory = BackwardMemory<T, kLast>;
  RealVec<T> u = strip.exchanged([&](int modality) {
    return widen(memory.storage.at(coord.thread_rank, storage_step, Memory::kX, modality));
  });
  if (memory.storage.tensors > Memory::kResidual) {
    const RealVec<T> residual =
        widen(memory.storage.at(coord.thread_rank, storage_step, Memory::kResidual, strip.m));
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l) u.element[l] += residual.element[l];
  }
  return u;
}

// The same for one element. Vectors of u and of all coefficients beside those of dz spill registers.
template <class T, bool kLast>
CEN_DEVICE Real<T> argument_of(const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                               int storage_step, int m, int l) {
  using Memory = BackwardMemory<T, kLast>;
  using R = Real<T>;
  const Table<T, kLast>& table = memory.table;
  const int w = kLast ? coord.line * kVecSize<T> + l : coord.line;
  const auto read = [&](int tensor, int modality) {
    return to_real(memory.storage.at(coord.thread_rank, storage_step, tensor, modality).element[l]);
  };
  const auto z = [&](int modality) {
    return (read(Memory::kX, modality) - table.at(kShift, modality, w)) * table.at(kScale, modality, w) +
           table.at(kOffset, modality, w);
  };
  const uint8_t flags = table.flags[m * table.width + w];
  R u = R(0);
  if (flags & kReplaced) {
    CEN_UNROLL_1
    for (int other = 0; other < table.modalities; ++other)
      if (other != m && table.lent_to(m, other, coord.line).has(l)) u += z(other);
    if (!(flags & kAlone)) u /= R(table.modalities - 1);
  } else {
    u = z(m);
  }
  return memory.storage.tensors > Memory::kResidual ? u + read(Memory::kResidual, m) : u;
}

// dy * activation'(u), which is the gradient of the residual. Requires activate() for this step before.
template <class T, bool kLast>
CEN_DEVICE RealVec<T> gradient(const Problem& p, const BackwardMemory<T, kLast>& memory,
                               const ThreadCoord<kLast>& coord, int storage_step, int m) {
  const Vec<T>& dy = memory.storage.at(coord.thread_rank, storage_step, BackwardMemory<T, kLast>::kDy, m);
  RealVec<T> g = widen(dy);
  if (p.activation == Activation::identity) return g;
  if (is_curved(p.activation)) {
    // One element after another, for the same reason; the assignment keeps g in registers.
    CEN_UNROLL_1
    for (int l = 0; l < kVecSize<T>; ++l) {
      const Real<T> u = argument_of(memory, coord, storage_step, m, l);
      Real<T> value = to_real(dy.element[l]);
      with_activation<Real<T>>(p, [&](auto activation) {
        if constexpr (decltype(activation)::kCurved) value = activation.gradient(value, u);
      });
      CEN_UNROLL
      for (int k = 0; k < kVecSize<T>; ++k) g.element[k] = k == l ? value : g.element[k];
    }
    return g;
  }
  with_activation<Real<T>>(p, [&](auto activation) {
    if constexpr (!decltype(activation)::kCurved) {
      const int passes = memory.passes_at(coord, storage_step, m);
      CEN_UNROLL
      for (int l = 0; l < kVecSize<T>; ++l)
        g.element[l] = passes >> l & 1 ? g.element[l] : activation.stopped(g.element[l]);
    }
  });
  return g;
}

// Records in `passes` where the activation's derivative is 1, for all modalities of a tile, and writes
// dresidual unless null.
template <class T, bool kLast>
CEN_DEVICE void activate(const Problem& p, const Geometry& geo, const BackwardTensors<T>& t,
                         const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                         const Tile& tile) {
  if (p.activation == Activation::identity && !t.dresidual) return;
  CEN_UNROLL_1
  for (int m = 0; m < memory.table.modalities; ++m) {
    const Strip<T, kLast> strip(memory.table, m, coord.line);
    const int64_t base = p.offset(m, coord.group);
    CEN_UNROLL
    for (int u = 0; u < kTile; ++u) {
      const VectorSlice& slice = tile.slices[u];
      const int storage_step = tile.storage_step + u;
      if (slice.empty()) continue;
      if (p.activation != Activation::identity) {
        const RealVec<T> v = argument(memory, coord, strip, storage_step);
        int passes = 0;
        with_activation<Real<T>>(p, [&](auto activation) {
          if constexpr (!decltype(activation)::kCurved) {
            CEN_UNROLL
            for (int l = 0; l < kVecSize<T>; ++l) passes |= activation.passes(v.element[l]) << l;
          }
        });
        memory.passes_at(coord, storage_step, m) = uint8_t(passes);
      }
      if (t.dresidual)
        write(geo, t.dresidual + base, slice, narrow<T>(gradient(p, memory, coord, storage_step, m)));
    }
  }
}

// The gradient of z before the exchange: that of its own modality, plus those of modalities that borrow it.
template <class T, bool kLast>
CEN_DEVICE RealVec<T> dz_of(const Problem& p, const BackwardMemory<T, kLast>& memory,
                            const ThreadCoord<kLast>& coord, const Strip<T, kLast>& strip, int storage_step) {
  RealVec<T> dz{};
  if (!strip.all_replaced) {
    dz = gradient(p, memory, coord, storage_step, strip.m);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l)
      dz.element[l] = strip.flags.replaced(l) ? Real<T>(0) : dz.element[l];
  }
  CEN_UNROLL_1
  for (int other = 0; other < memory.table.modalities; ++other) {
    const Lent<kLast> lent = memory.table.lent_to(other, strip.m, coord.line);
    if (other == strip.m || lent.bits == 0) continue;
    const Flags<T, kLast> borrower = memory.table.flags_of(other, coord.line);
    const RealVec<T> g = gradient(p, memory, coord, storage_step, other);
    CEN_UNROLL
    for (int l = 0; l < kVecSize<T>; ++l)
      dz.element[l] += lent.has(l) ? g.element[l] * strip.share(borrower, l) : Real<T>(0);
  }
  return dz;
}

// x - mean, and 0 where x is of no use.
template <class T, bool kLast>
CEN_DEVICE RealVec<T> centered(const BackwardMemory<T, kLast>& memory, const ThreadCoord<kLast>& coord,
                               const Strip<T, kLast>& strip, int storage_step) {
  RealVec<T> d{};
  if (strip.flags.all(kDead)) return d;
  const RealVec<T> x =
      widen(memory.storage.at(coord.thread_rank, storage_step, BackwardMemory<T, kLast>::kX, strip.m));
  CEN_UNROLL
  for (int l = 0; l < kVecSize<T>; ++l)
    d.element[l] = strip.flags.dead(l) ? Real<T>(0) : x.element[l] - strip.own.shift.element[l];
  return d;
}

}  // namespace cen::cuda
