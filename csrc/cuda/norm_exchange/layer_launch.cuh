// The plan of layer norm, of which there is one: a single pass.
#pragma once

#include <stdexcept>

#include "../plan.h"
#include "layer_backward.cuh"
#include "layer_forward.cuh"

namespace cen::cuda {

// Places per tile, channels first, of which a whole 128-byte line is read.
constexpr int kLayerPlaces = 8;
// Blocks per multiprocessor that shared memory is to have room for, if a tile can be as small as that.
constexpr int kLayerShare = 3;

// Whether 16-byte access is possible: also to tables [M, C], and to every line of channels first.
template <class T>
bool has_layer_vectors(const Problem& p, std::initializer_list<const void*> tensors) {
  return has_vectors<T>(p, tensors) && (p.channels_last || p.spatial % kVecSize<T> == 0);
}

// At most `places` places and `threads` threads.
template <class T>
LayerGeometry layer_tiles(const Problem& p, bool vectors, int64_t places, int threads) {
  constexpr int64_t n = kVecSize<T>;
  LayerGeometry geo{};
  geo.vectors = vectors;
  const int64_t vectors_per_place = p.channels_last ? divide_up(p.channels, n) : p.channels;
  const int64_t team = std::max<int64_t>(1, p.channels_last ? threads : threads / places);
  geo.steps = int(divide_up(vectors_per_place, team));
  geo.team = int(divide_up(vectors_per_place, geo.steps));
  geo.places = int(std::min<int64_t>(places, std::max(1, threads / geo.team)));
  geo.row_tiles = divide_up(p.spatial, geo.places * n);
  geo.tiles = p.channels_last ? divide_up(p.groups * p.spatial, geo.places) : p.groups * geo.row_tiles;
  return geo;
}

// bytes(geo) is the shared memory of a block; blocks_of_256 of kLayerThreads threads fit on a multiprocessor.
template <class T, class Bytes>
LayerGeometry layer_plan(const Problem& p, bool vectors, const Device& device, int blocks_of_256,
                         Bytes bytes) {
  const auto with_blocks = [&](LayerGeometry geo) {
    const int64_t fit = std::min(device.shared_bytes / std::max<int64_t>(1, bytes(geo)),
                                 int64_t{blocks_of_256} * kLayerThreads / geo.threads());
    geo.blocks = std::min(geo.tiles, device.multiprocessors * std::max<int64_t>(1, fit));
    return geo;
  };
  if (std::max(p.channels, p.groups) >= int64_t{1} << 30)
    throw std::invalid_argument("cen_ext: too many channels or samples for one launch");
  for (int threads = device.threads;; threads /= 2) {
    const int64_t most = p.channels_last
                             ? std::min<int64_t>(threads, p.groups * p.spatial)
                             : std::min<int64_t>({kLayerPlaces, threads,
                                                  power_of_two_from(divide_up(p.spatial, kVecSize<T>))});
    for (const int share : {kLayerShare, 1})
      for (int64_t places = most; places >= 1; places /= 2) {
        LayerGeometry geo = layer_tiles<T>(p, vectors, places, threads);
        geo.kept = geo.sums_kept = true;
        const bool idle = geo.tiles < device.multiprocessors && geo.places > 2 && geo.threads() > 32;
        if (!idle && bytes(geo) <= device.shared_bytes / share) return with_blocks(geo);
      }
    for (const bool sums_kept : {true, false}) {
      LayerGeometry geo = layer_tiles<T>(p, vectors, most, threads);
      geo.sums_kept = sums_kept;
      // Very many modalities require smaller blocks; a single warp is the last resort.
      if (bytes(geo) <= device.shared_bytes || (!sums_kept && threads <= 32)) return with_blocks(geo);
    }
  }
}

template <class T, bool kLast, class Memory>
Launch layer_shape(const LayerGeometry& geo, const Memory& memory, void* stream) {
  return {geo.blocks,
          kLast ? geo.team : geo.places,
          kLast ? geo.places : geo.team,
          memory.allocator.used,
          1,
          false,
          stream};
}

template <class T, bool kLast>
void layer_forward_in(const Problem& p, const ForwardTensors<T>& t, const Device& device, void* stream) {
  const bool vectors = has_layer_vectors<T>(p, {t.x, t.residual, t.y, t.weight, t.bias});
  const auto memory = [&](const LayerGeometry& geo) {
    return LayerMemory<T, kLast>(nullptr, p, geo, LayerForward<T, kLast>::tensors(t), false);
  };
  const LayerGeometry geo = layer_plan<T>(p, vectors, device, kLayerForwardBlocks<T>,
                                          [&](const auto& g) { return memory(g).allocator.used; });
  launch(layer_forward<T, kLast>, layer_shape<T, kLast>(geo, memory(geo), stream), p, geo, t);
}

template <class T, bool kLast>
void layer_backward_in(const Problem& p, const BackwardTensors<T>& t, const Device& device,
                       const Allocate& allocate, void* stream) {
  using R = Real<T>;
  using Sums = LayerSums<T, kLast>;
  const bool vectors = has_layer_vectors<T>(p, {t.dy, t.x, t.residual, t.dx, t.dresidual, t.weight, t.bias});
  const auto memory = [&](const LayerGeometry& geo) {
    return LayerMemory<T, kLast>(nullptr, p, geo, LayerBackward<T, kLast>::tensors(t), geo.sums_kept);
  };
  const LayerGeometry geo = layer_plan<T>(p, vectors, device, kLayerBackwardBlocks<T>,
                                          [&](const auto& g) { return memory(g).allocator.used; });
  Sums scratch{};
  if (!geo.sums_kept)
    scratch.pieces = static_cast<typename Sums::Piece*>(
        allocate(geo.blocks * Sums::size(p, geo) * int64_t(sizeof(typename Sums::Piece))));
  const int64_t size = geo.blocks * p.modalities * p.channels;
  R* partials = static_cast<R*>(allocate(2 * size * int64_t(sizeof(R))));
  const PartialSums<R> of_blocks{partials, partials + size};
  launch(layer_backward<T, kLast>, layer_shape<T, kLast>(geo, memory(geo), stream), p, geo, t, of_blocks,
         scratch, geo.kept && keeps_gradient<T>(p.activation));
  Problem whole = p;
  whole.groups = 1;
  launch(finish_sums<T>, finish_shape<FinishCoord>(whole, stream), whole, geo.blocks, t, of_blocks);
}

}  // namespace cen::cuda
