// Implements kernels.h for one type of x. There is one .cu file per type, so that they compile in parallel.
#pragma once

#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../plan.h"
#include "layer_launch.cuh"

namespace cen::cuda {

// Calls f with channels_last as a compile-time constant.
template <class F>
void with_layout(bool channels_last, F f) {
  if (channels_last)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Slices of a channel are indexed with 32 bits; a launch has fewer than 2^31 blocks.
inline void check_values(const Problem& p) {
  if (p.spatial >= int64_t{1} << 31 || p.samples * (p.spatial + 16) >= int64_t{1} << 31)
    throw std::invalid_argument("cen_ext: a channel has more than 2^31 values in one modality");
}
inline void check_blocks(const Problem& p, const Geometry& geo) {
  if (geo.blocks(p.units()) >= int64_t{1} << 31)
    throw std::invalid_argument("cen_ext: too many channels for one launch");
}

inline Launch shape(const Plan& plan, int64_t blocks, void* stream) {
  const Geometry& geo = plan.geometry;
  return {blocks,       geo.threads_x,           geo.threads_y, plan.shared_bytes,
          plan.cluster, plan.kind == Kind::grid, stream};
}

template <class R>
std::pair<R*, R*> two_tables(const Problem& p, const Geometry& geo, const Allocate& allocate) {
  const int64_t size = geo.chunks * p.units() * p.channels;
  R* memory = static_cast<R*>(allocate(2 * size * sizeof(R)));
  return {memory, memory + size};
}

// The plan to use when the device, which may be shared or partitioned, cannot run the planned one.
template <class TwoPass>
Plan fallback(Kind asked, TwoPass plan_two_pass) {
  if (asked != Kind::automatic)
    throw std::invalid_argument("cen_ext: the device cannot run the plan asked for");
  return plan_two_pass();
}

template <class T, bool kLast>
void forward_in(const Problem& p, const ForwardTensors<T>& t, Kind kind, const Device& device,
                const Allocate& allocate, void* stream) {
  const bool vectors = has_vectors<T>(p, {t.x, t.residual, t.y}), residual = t.residual != nullptr;
  const auto two_pass_bytes = [&](const Geometry& geo, int64_t steps) {
    return std::max(ForwardMemory<T, kLast>(nullptr, p, geo, residual, steps).allocator.used,
                    StatisticsMemory<T, kLast>(nullptr, geo).allocator.used);
  };
  const auto resident_bytes = [&](const Geometry& geo, int64_t steps) {
    return ResidentForwardMemory<T, kLast>(nullptr, p, geo, residual, steps).allocator.used;
  };
  Plan plan = make_plan<T>(p, vectors, kind, device, two_pass_bytes, resident_bytes);
  if (plan.kind != Kind::two_pass &&
      !can_run(resident_forward<T, kLast>, shape(plan, plan.geometry.blocks(p.groups), stream)))
    plan = fallback(kind, [&] { return plan_two_pass<T>(p, vectors, device, two_pass_bytes); });
  const Geometry& geo = plan.geometry;
  check_blocks(p, geo);
  const Launch groups = shape(plan, geo.blocks(p.groups), stream);
  if (plan.kind == Kind::two_pass) {
    ForwardTensors<T> given = t;
    if (p.batch_statistics) {
      const auto [mean, var] = two_tables<double>(p, geo, allocate);
      launch(statistics_kernel<T, kLast>, shape(plan, geo.blocks(p.units()), stream), p, geo, t.x,
             Partials{mean, var});
      if (p.joined > 1)
        launch(join_statistics<T, kLast>, finish_shape<JoinCoord>(p, stream), p, geo, t, Partials{mean, var});
      else
        launch(finish_statistics<T, kLast>, finish_shape<FinishCoord>(p, stream), p, geo, t,
               Partials{mean, var});
      given.mean = t.batch_mean;
      given.var = t.batch_var;
    }
    launch(two_pass_forward<T, kLast>, groups, p, geo, given);
    return;
  }
  Partials partials{};
  if (plan.kind == Kind::grid) std::tie(partials.mean, partials.var) = two_tables<double>(p, geo, allocate);
  launch(resident_forward<T, kLast>, groups, p, geo, t, partials);
  if (t.running_mean && p.groups > 1)
    launch(finish_statistics<T, kLast>, finish_shape<FinishCoord>(p, stream), p, geo, t, Partials{});
}

template <class T, bool kLast>
void backward_in(const Problem& p, BackwardTensors<T> t, Kind kind, const Device& device,
                 const Allocate& allocate, void* stream) {
  using R = Real<T>;
  const bool vectors = has_vectors<T>(p, {t.dy, t.x, t.residual, t.dx, t.dresidual});
  const bool residual = t.residual != nullptr;
  const auto bytes = [&](const Geometry& geo, int64_t steps) {
    return BackwardMemory<T, kLast>(nullptr, p, geo, residual, steps, false).allocator.used;
  };
  const auto resident_bytes = [&](const Geometry& geo, int64_t steps) {
    return BackwardMemory<T, kLast>(nullptr, p, geo, residual, steps, p.joined > 1).allocator.used;
  };
  Plan plan = make_plan<T>(p, vectors, kind, device, bytes, resident_bytes);
  if (plan.kind != Kind::two_pass &&
      !can_run(resident_backward<T, kLast>, shape(plan, plan.geometry.blocks(p.groups), stream)))
    plan = fallback(kind, [&] { return plan_two_pass<T>(p, vectors, device, bytes); });
  const Geometry& geo = plan.geometry;
  check_blocks(p, geo);
  const Launch groups = shape(plan, geo.blocks(p.groups), stream);
  PartialSums<R> partials{};
  if (plan.kind != Kind::cluster || p.groups > 1)
    std::tie(partials.dz, partials.on_x) = two_tables<R>(p, geo, allocate);
  const auto finish = [&] {
    launch(finish_sums<T>, finish_shape<FinishCoord>(p, stream), p, geo.chunks, t, partials);
  };
  if (plan.kind != Kind::two_pass) {
    launch(resident_backward<T, kLast>, groups, p, geo, t, partials, plan.kind == Kind::grid);
    if (p.groups > 1) finish();
    return;
  }
  if (!p.batch_statistics) {
    launch(two_pass_backward<T, kLast>, groups, p, geo, t, partials, Pass::both);
    finish();
    return;
  }
  launch(two_pass_backward<T, kLast>, groups, p, geo, t, partials, Pass::sums);
  finish();
  if (p.joined > 1) launch(join_sums<T>, finish_shape<JoinCoord>(p, stream), p, t, partials);
  Problem second = p;
  // dresidual is dy behind the activation, so the second pass need not read the residual.
  if (t.dresidual && keeps_gradient<T>(p.activation)) {
    t.dy = t.dresidual;
    t.residual = nullptr;
    second.activation = Activation::identity;
  }
  t.dresidual = nullptr;
  launch(two_pass_backward<T, kLast>, groups, second, geo, t, partials, Pass::dx);
}

template <class T>
void forward(const Problem& p, const ForwardTensors<T>& t, Kind kind, const Device& device,
             const Allocate& allocate, void* stream) {
  check_values(p);
  with_layout(p.channels_last, [&](auto last) {
    constexpr bool kLast = decltype(last)::value;
    if (p.norm == Norm::layer) return layer_forward_in<T, kLast>(p, t, device, stream);
    forward_in<T, kLast>(p, t, kind, device, allocate, stream);
  });
}

template <class T>
void backward(const Problem& p, const BackwardTensors<T>& t, Kind kind, const Device& device,
              const Allocate& allocate, void* stream) {
  check_values(p);
  with_layout(p.channels_last, [&](auto last) {
    constexpr bool kLast = decltype(last)::value;
    if (p.norm == Norm::layer) return layer_backward_in<T, kLast>(p, t, device, allocate, stream);
    backward_in<T, kLast>(p, t, kind, device, allocate, stream);
  });
}

}  // namespace cen::cuda
