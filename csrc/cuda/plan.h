// The choice of plan, block shape and number of blocks from the problem's sizes and the device. None of the
// constants has been measured yet; each states its purpose.
#pragma once

#include <algorithm>
#include <numeric>

#include "kernels.h"
#include "norm_exchange/backward.cuh"

namespace cen::cuda {

// Blocks per multiprocessor that the two-pass plan launches, enough to keep every multiprocessor busy.
constexpr int kTwoPassShare = 4;
// Vectors per row of a strip, channels last: a whole 128-byte line for resident plans, longer runs for two
// passes.
constexpr int kResidentVectors = 8, kTwoPassVectors = 32;
// The largest cluster that is portable across devices.
constexpr int kClusterBlocks = 8;
// Up to this size x stays in the L2 cache in any case, so that launches cost more than bytes.
constexpr int64_t kSmallBytes = 4 << 20;
// The share of multiprocessors that must be busy for one pass to beat two (3S against 2S bytes).
constexpr double kWorthResident = 0.67;
// Multiprocessors of every 16 that a cooperative launch may occupy, because others may use the GPU, too.
constexpr int kCountedIn16 = 15;

struct Plan {
  Kind kind;
  Geometry geometry;
  int64_t shared_bytes;
  int cluster = 1;
};

constexpr int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Whether 16-byte vector access is possible: all tensors are aligned, and so are all samples (channels first)
// or rows (channels last).
template <class T>
bool has_vectors(const Problem& p, std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
  return (p.channels_last ? p.channels : p.channels * p.spatial) % kVecSize<T> == 0;
}

// A geometry with a single chunk, blocks of at most `threads` threads and, for channels last, strips of at
// most `strip_vectors` vectors. A strip has a multiple of `lines` vectors (channels last) or channels, which
// is at most `threads`.
template <class T>
Geometry whole_strips(const Problem& p, bool vectors, int threads, int strip_vectors, int lines = 1) {
  constexpr int64_t n = kVecSize<T>;
  const auto in_whole = [&](int64_t wanted) { return int(std::max<int64_t>(1, wanted / lines) * lines); };
  Geometry geo{};
  geo.vec_size = n;
  geo.vectors = vectors;
  if (p.channels_last) {
    geo.row_slices = p.spatial;
    geo.slices = p.values();
    const int64_t row = divide_up(p.channels, n);
    geo.threads_x = in_whole(std::min<int64_t>({power_of_two_from(row), strip_vectors, threads}));
    geo.threads_y =
        int(std::min<int64_t>(threads / geo.threads_x, power_of_two_from(divide_up(geo.slices, kTile))));
    geo.strips = divide_up(row, geo.threads_x);
  } else {
    // A line may begin anywhere within a vector unless p.spatial is a multiple of the vector size.
    const int64_t before = vectors && p.spatial % n != 0 ? n - 1 : 0;
    geo.row_slices = divide_up(p.spatial + before, n);
    geo.slices = p.samples * geo.row_slices;
    geo.threads_x = int(std::min<int64_t>(threads, power_of_two_from(divide_up(geo.slices, kTile))));
    geo.threads_y = in_whole(std::min<int64_t>(threads / geo.threads_x, power_of_two_from(p.channels)));
    while (geo.threads_x * geo.threads_y > threads) geo.threads_x /= 2;
    geo.strips = divide_up(p.channels, geo.threads_y);
  }
  geo.by_row = Divider(uint32_t(geo.row_slices));
  geo.chunks = 1;
  geo.chunk = geo.slices;
  return geo;
}

// The same for a resident plan: channels that share statistics lie in one strip, whose blocks join them.
// Returns false where a block has too few threads for them. (Blocks of several strips would have to wait for
// one another twice; in two passes it is a kernel between the two that joins.)
template <class T>
bool resident_strips(const Problem& p, bool vectors, const Device& device, Geometry& geo) {
  const int threads = std::min(kResidentThreads, 2 * device.threads);
  const int64_t lines = p.channels_last ? p.joined / std::gcd(p.joined, kVecSize<T>) : p.joined;
  if (lines > threads) return false;
  geo = whole_strips<T>(p, vectors, threads, kResidentVectors, int(lines));
  return true;
}

// Splits the strips of a geometry into at most `chunks` chunks, none of them empty.
inline Geometry in_chunks(Geometry geo, int64_t chunks) {
  geo.chunk = divide_up(geo.slices, std::max<int64_t>(1, chunks));
  geo.chunks = divide_up(geo.slices, geo.chunk);
  return geo;
}

inline int64_t line_threads(const Problem& p, const Geometry& geo) {
  return p.channels_last ? geo.threads_y : geo.threads_x;
}
inline int64_t steps(const Problem& p, const Geometry& geo) {
  return divide_up(geo.chunk, line_threads(p, geo));
}

// bytes(geo, steps) is the shared memory of a block that holds `steps` steps.
template <class T, class Bytes>
Plan plan_two_pass(const Problem& p, bool vectors, const Device& device, Bytes bytes) {
  for (int threads = device.threads;; threads /= 2) {
    const Geometry whole = whole_strips<T>(p, vectors, threads, kTwoPassVectors);
    const int64_t wanted = divide_up(int64_t(device.multiprocessors) * kTwoPassShare, whole.blocks(p.groups)),
                  most = divide_up(whole.slices, line_threads(p, whole) * kTile);
    const Geometry geo = in_chunks(whole, std::min(wanted, most));
    const int64_t shared = bytes(geo, kTwoPassSteps);
    // Very many modalities require smaller blocks; a single warp is the last resort.
    if (shared <= device.shared_bytes || threads <= 32) return {Kind::two_pass, geo, shared};
  }
}

template <class T, class Bytes>
bool plan_cluster(const Problem& p, bool vectors, const Device& device, Bytes bytes, Plan& plan) {
  Geometry whole;
  if (!resident_strips<T>(p, vectors, device, whole)) return false;
  const int most = device.capability >= 90 ? kClusterBlocks : 1;
  for (int cluster = 1; cluster <= most; cluster *= 2) {
    const Geometry geo = in_chunks(whole, cluster);
    if (geo.chunks != cluster) return false;  // fewer slices than blocks
    const int64_t shared = bytes(geo, steps(p, geo));
    if (shared > device.shared_bytes) continue;
    plan = {Kind::cluster, geo, shared, cluster};
    // Doubles the cluster while multiprocessors are idle and every thread has more than one tile.
    if (geo.blocks(p.groups) >= device.multiprocessors || steps(p, geo) <= kTile) return true;
  }
  return plan.kind == Kind::cluster;
}

template <class T, class Bytes>
bool plan_grid(const Problem& p, bool vectors, const Device& device, Bytes bytes, Plan& plan) {
  Geometry whole;
  if (!resident_strips<T>(p, vectors, device, whole)) return false;
  const int64_t room = std::max(1, device.multiprocessors * kCountedIn16 / 16);
  const int64_t chunks = room / whole.blocks(p.groups);
  if (chunks < 1) return false;
  const Geometry geo = in_chunks(whole, chunks);
  const int64_t shared = bytes(geo, steps(p, geo));
  if (shared > device.shared_bytes) return false;
  plan = {Kind::grid, geo, shared};
  return true;
}

// The average share of multiprocessors that a launch keeps busy, including its partial last wave.
inline double share_at_work(const Problem& p, const Plan& plan, const Device& device) {
  const int64_t fit = std::max<int64_t>(1, device.shared_bytes / std::max<int64_t>(1, plan.shared_bytes)),
                room = device.multiprocessors * std::min<int64_t>(fit, 2048 / kResidentThreads),
                blocks = plan.geometry.blocks(p.groups);
  return double(blocks) / double(divide_up(blocks, room) * room);
}

template <class T, class TwoPassBytes, class ResidentBytes>
Plan make_plan(const Problem& p, bool vectors, Kind kind, const Device& device, TwoPassBytes two_pass_bytes,
               ResidentBytes resident_bytes) {
  const bool any = kind == Kind::automatic;
  Plan plan{};
  if (p.batch_statistics && kind != Kind::two_pass) {
    const bool small = p.units() * p.unit_size() * int64_t(sizeof(T)) <= kSmallBytes;
    if ((any || kind == Kind::cluster) && plan_cluster<T>(p, vectors, device, resident_bytes, plan) &&
        (!any || small || share_at_work(p, plan, device) >= kWorthResident))
      return plan;
    if ((any || kind == Kind::grid) && plan_grid<T>(p, vectors, device, resident_bytes, plan) &&
        (!any || share_at_work(p, plan, device) >= kWorthResident))
      return plan;
    if (!any)
      throw std::invalid_argument("cen_ext: the plan asked for does not fit this problem on this device");
  }
  return plan_two_pass<T>(p, vectors, device, two_pass_bytes);
}

}  // namespace cen::cuda
