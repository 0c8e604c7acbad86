// The ops torch.ops.cen_ext.norm_exchange*: argument checks, allocation and dispatch to CPU or CUDA kernels.
// The public functions in cen_ext/functional.py have already checked the arguments in the caller's terms.
#include <string>
#include <tuple>

#include "../tensors.h"
#if defined(CEN_CUDA)
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace cen {
namespace {

// Converts a string argument of an op and frees its handle. (The header's conversion to std::string leaks one
// string per call in torch 2.13.)
std::string take_string(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

template <class E>
E parse(const char* name, const std::string& value,
        std::initializer_list<std::pair<const char*, E>> choices) {
  for (const auto& [text, choice] : choices)
    if (value == text) return choice;
  STD_TORCH_CHECK(false, "cen_ext: unknown ", name, " '", value, "'");
}

// The trailing arguments that all three ops share.
struct Options {
  double threshold;
  StringHandle region, criterion, norm;
  double eps;
  StringHandle activation;
  double negative_slope;
  StringHandle order;
  int64_t num_groups;
  StringHandle plan;
};

// The scalar arguments of a call.
struct Call {
  Problem p{};
  int64_t num_groups;
  std::string plan;  // name of a cuda::Kind (csrc/cuda/kernels.h); the CPU ignores it

  explicit Call(const Options& options) : num_groups(options.num_groups), plan(take_string(options.plan)) {
    const std::string region = take_string(options.region), criterion = take_string(options.criterion),
                      norm = take_string(options.norm), activation = take_string(options.activation),
                      order = take_string(options.order);
    p.threshold = options.threshold;
    p.region = parse<Region>("region", region, {{"own", Region::own}, {"all", Region::all}});
    p.criterion = parse<Criterion>("criterion", criterion,
                                   {{"abs", Criterion::magnitude}, {"signed", Criterion::signed_value}});
    p.norm = parse<Norm>("norm", norm,
                         {{"batch", Norm::batch},
                          {"instance", Norm::instance},
                          {"group", Norm::group},
                          {"layer", Norm::layer}});
    p.eps = options.eps;
#define CEN_CHOICE(name) {#name, Activation::name},
    p.activation = parse<Activation>("activation", activation, {CEN_ACTIVATIONS(CEN_CHOICE)});
#undef CEN_CHOICE
    p.negative_slope = options.negative_slope;
    p.order = parse<Order>("order", order, {{"modality", Order::modality}, {"sample", Order::sample}});
  }
};

// Sets the sizes of the problem. Given statistics decide what the units are: mean is [M, C] for batch norm,
// or else it has a row per sample.
void set_sizes(Call& call, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& mean) {
  Problem& p = call.p;
  STD_TORCH_CHECK(x.dim() >= 2 && weight.dim() == 2 && weight.size(0) >= 1,
                  "cen_ext: x must be [M*N, C, ...], weight [M, C]");
  p.modalities = weight.size(0);
  p.channels = x.size(1);
  STD_TORCH_CHECK(weight.size(1) == p.channels && x.size(0) % p.modalities == 0,
                  "cen_ext: x does not fit weight [M, C]");
  STD_TORCH_CHECK(p.modalities <= kMostModalities,
                  "cen_ext: weight has rows for more than 32766 modalities; use the reference backend");
  const int64_t samples = x.size(0) / p.modalities;
  bool per_sample = p.norm != Norm::batch;
  if (mean && !p.across_channels()) per_sample = mean->dim() != 2 || mean->size(0) != p.modalities;
  p.groups = per_sample ? samples : 1;
  p.samples = per_sample ? 1 : samples;
  p.joined = 1;
  if (p.norm == Norm::group) {
    STD_TORCH_CHECK(call.num_groups > 0 && p.channels % call.num_groups == 0,
                    "cen_ext: num_groups must divide the channels of x");
    p.joined = p.channels / call.num_groups;
  }
  p.spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.spatial *= x.size(d);
}

// The sizes of mean and var.
Sizes statistics_sizes(const Problem& p) {
  return {p.units(), p.norm == Norm::layer ? p.spatial : p.channels / p.joined};
}

// Sets the fields of the problem that depend on the memory layout of x.
void set_memory(Problem& p, const Tensor& x, bool channels_last, bool native) {
  p.channels_last = channels_last;
  p.streaming_stores = is_streamed(x, native);
}

void check_inputs(const Problem& p, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& route) {
  const ScalarType type = x.scalar_type(),
                   real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(is_floating(type), "cen_ext: x must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "cen_ext: mean and var go together");
  const Sizes table{p.modalities, p.channels}, statistics = statistics_sizes(p);
  check_as("weight", weight, real, table, x);
  check_as("bias", bias, real, table, x);
  if (mean) check_as("mean", *mean, real, statistics, x);
  if (var) check_as("var", *var, real, statistics, x);
  if (residual) check_as("residual", *residual, type, sizes_of(x), x);
  if (route) check_as("route", *route, ScalarType::Int, table, x);
}

// ---- dispatch by the device of x ----

#if defined(CEN_CUDA)
// Calls f(kind, device, allocate, stream) with the device of x as current device, on its current stream.
template <class F>
void on_gpu(const Call& call, const Tensor& x, F f) {
  const auto kind = parse<cuda::Kind>("plan", call.plan,
                                      {{"auto", cuda::Kind::automatic},
                                       {"two_pass", cuda::Kind::two_pass},
                                       {"stream", cuda::Kind::two_pass},  // the former name of two_pass
                                       {"cluster", cuda::Kind::cluster},
                                       {"grid", cuda::Kind::grid}});
  std::vector<Tensor> scratch;  // freed on return: the caching allocator reuses memory in stream order
  const cuda::Allocate allocate = [&](int64_t bytes) {
    scratch.push_back(empty_table({bytes / static_cast<int64_t>(x.element_size()) + 1}, x));
    return scratch.back().mutable_data_ptr();
  };
  on_stream(x, [&](void* stream) { f(kind, cuda::current_device(), allocate, stream); });
}
#endif

template <class T>
void run(const Call& call, const ForwardTensors<T>& t, const Tensor& x) {
  const Problem& p = call.p;
#if defined(CEN_CUDA)
  if (x.is_cuda()) return on_gpu(call, x, [&](auto... how) { cuda::forward(p, t, how...); });
#endif
  cpu::instruction_set().of<T>().forward(p, t, threads_for(x.numel()));
  if (t.running_mean) cpu::update_running(p, t.batch_mean, t.batch_var, t.running_mean, t.running_var);
}

template <class T>
void run(const Call& call, const BackwardTensors<T>& t, const Tensor& x) {
#if defined(CEN_CUDA)
  if (x.is_cuda()) return on_gpu(call, x, [&](auto... how) { cuda::backward(call.p, t, how...); });
#endif
  cpu::instruction_set().of<T>().backward(call.p, t, threads_for(x.numel()));
}

// ---- the ops ----

struct Running {
  Tensor mean, var;
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> mean,
                                           std::optional<Tensor> var, std::optional<Tensor> residual,
                                           const std::optional<Running>& running, std::optional<Tensor> route,
                                           Call call) {
  Problem& p = call.p;
  set_sizes(call, x, weight, mean);
  check_inputs(p, x, weight, bias, mean, var, residual, route);
  p.batch_statistics = !mean;
  const Sizes table = p.batch_statistics ? statistics_sizes(p) : Sizes{0};
  if (x.numel() == 0)
    return {torch::stable::empty_like(x), torch::stable::new_zeros(weight, table),
            torch::stable::new_zeros(weight, table)};
  const Tensor batch_mean = empty_table(table, weight), batch_var = empty_table(table, weight);

  const Layout layout(x);
  set_memory(p, x, layout.channels_last(), layout.native());
  x = layout.to_kernel(x);
  residual = layout.to_kernel(residual);
  weight = packed(weight);
  bias = packed(bias);
  mean = packed(mean);
  var = packed(var);
  route = packed(route);
  const Tensor y = layout.empty();
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    run(call,
        ForwardTensors<T>{data<T>(x), data<R>(weight), data<R>(bias), data<R>(mean), data<R>(var),
                          data<T>(residual), mutable_data<T>(y), mutable_data<R>(batch_mean),
                          mutable_data<R>(batch_var), running ? mutable_data<R>(running->mean) : nullptr,
                          running ? mutable_data<R>(running->var) : nullptr, data<int32_t>(route)},
        x);
  });
  return {layout.from_kernel(y), batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor> norm_exchange(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> mean, std::optional<Tensor> var,
    std::optional<Tensor> residual, double threshold, StringHandle region, StringHandle criterion,
    StringHandle norm, double eps, StringHandle activation, double negative_slope, StringHandle order,
    int64_t num_groups, std::optional<Tensor> route, StringHandle plan) {
  return forward(
      x, weight, bias, mean, var, residual, std::nullopt, route,
      Call({threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups, plan}));
}

std::tuple<Tensor, Tensor, Tensor> norm_exchange_updating(
    Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var,
    std::optional<Tensor> residual, double momentum, double threshold, StringHandle region,
    StringHandle criterion, StringHandle norm, double eps, StringHandle activation, double negative_slope,
    StringHandle order, int64_t num_groups, std::optional<Tensor> route, StringHandle plan) {
  Call call({threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups, plan});
  call.p.momentum = momentum;
  check_as("running_mean", running_mean, weight.scalar_type(), sizes_of(weight), x);
  check_as("running_var", running_var, weight.scalar_type(), sizes_of(weight), x);
  STD_TORCH_CHECK(running_mean.is_contiguous() && running_var.is_contiguous(),
                  "cen_ext: running statistics must be contiguous");
  return forward(x, weight, bias, std::nullopt, std::nullopt, residual, Running{running_mean, running_var},
                 route, call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_exchange_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, std::optional<Tensor> residual,
    bool batch_statistics, double threshold, StringHandle region, StringHandle criterion, StringHandle norm,
    double eps, StringHandle activation, double negative_slope, StringHandle order, int64_t num_groups,
    std::optional<Tensor> route, StringHandle plan) {
  Call call({threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups, plan});
  Problem& p = call.p;
  set_sizes(call, x, weight, mean);
  check_inputs(p, x, weight, bias, mean, var, residual, route);
  check_as("dy", dy, x.scalar_type(), sizes_of(x), x);
  p.batch_statistics = batch_statistics;
  const Sizes table{p.modalities, p.channels};
  const Tensor none = empty_table({0}, x);
  if (x.numel() == 0)
    return {torch::stable::empty_like(x), torch::stable::new_zeros(weight, table),
            torch::stable::new_zeros(weight, table), residual ? torch::stable::empty_like(x) : none};
  const Tensor dweight = empty_table(table, weight), dbias = empty_table(table, weight);

  const Layout layout(x);
  set_memory(p, x, layout.channels_last(), layout.native());
  dy = layout.to_kernel(dy);
  x = layout.to_kernel(x);
  residual = layout.to_kernel(residual);
  weight = packed(weight);
  bias = packed(bias);
  mean = packed(mean);
  var = packed(var);
  route = packed(route);
  const Tensor dx = layout.empty();
  const Tensor dresidual = residual ? layout.empty() : none;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    run(call,
        BackwardTensors<T>{data<T>(dy), data<T>(x), data<R>(weight), data<R>(bias), data<R>(mean),
                           data<R>(var), data<T>(residual), mutable_data<T>(dx), mutable_data<R>(dweight),
                           mutable_data<R>(dbias), residual ? mutable_data<T>(dresidual) : nullptr,
                           data<int32_t>(route)},
        x);
  });
  return {layout.from_kernel(dx), dweight, dbias, residual ? layout.from_kernel(dresidual) : none};
}

}  // namespace

#define CEN_OPTIONS                                                                                         \
  "float threshold, str region, str criterion, str norm, float eps, str activation, float negative_slope, " \
  "str order='modality', int num_groups=1, Tensor? route=None, str plan='auto'"

STABLE_TORCH_LIBRARY(cen_ext, m) {
  m.def(
      "norm_exchange(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, Tensor? residual, "  //
      CEN_OPTIONS ") -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_exchange_updating(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor? residual, float momentum, "  //
      CEN_OPTIONS ") -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_exchange_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, "
      "Tensor? residual, bool batch_statistics, "  //
      CEN_OPTIONS ") -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) {
  m.impl("norm_exchange", TORCH_BOX(&norm_exchange));
  m.impl("norm_exchange_updating", TORCH_BOX(&norm_exchange_updating));
  m.impl("norm_exchange_backward", TORCH_BOX(&norm_exchange_backward));
}

#if defined(CEN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(cen_ext, CUDA, m) {
  m.impl("norm_exchange", TORCH_BOX(&norm_exchange));
  m.impl("norm_exchange_updating", TORCH_BOX(&norm_exchange_updating));
  m.impl("norm_exchange_backward", TORCH_BOX(&norm_exchange_backward));
}
#endif

}  // namespace cen
