// The ops torch.ops.cen_ext.*, through LibTorch's stable ABI: one build serves every torch from 2.10 on.
// The only file that sees tensors: it checks them, allocates results, picks the memory layout.
// Public functions check arguments in the caller's words before (cen_ext/functional.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#if defined(CEN_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

// Declared by LibTorch in its CUDA builds only. Weak, so that what was built beside one without CUDA still
// loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** stream);
#endif

namespace cen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Text argument of an op. (The header's conversion to std::string leaks one string a call in torch 2.13.)
std::string take(StringHandle handle) {
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

// Arguments that every op ends with.
struct Options {
  double threshold;
  StringHandle region, criterion, norm;
  double eps;
  StringHandle activation;
  double negative_slope;
  StringHandle plan;
};

// A call without its tensors. groups is 0 where the samples of a modality are to be counted.
struct Call {
  Problem p{};
  std::string plan;  // how a GPU goes over memory (csrc/cuda/kernels.h); of no meaning elsewhere

  explicit Call(const Options& options) : plan(take(options.plan)) {
    const std::string region = take(options.region), criterion = take(options.criterion),
                      norm = take(options.norm), activation = take(options.activation);
    p.threshold = options.threshold;
    p.region = parse<Region>("region", region, {{"own", Region::own}, {"all", Region::all}});
    p.criterion = parse<Criterion>("criterion", criterion,
                                   {{"abs", Criterion::magnitude}, {"signed", Criterion::signed_value}});
    p.groups = parse<int64_t>("norm", norm, {{"batch", 1}, {"instance", 0}});
    p.eps = options.eps;
    p.activation = parse<Activation>("activation", activation,
                                     {{"identity", Activation::identity},
                                      {"relu", Activation::relu},
                                      {"leaky_relu", Activation::leaky_relu}});
    p.negative_slope = options.negative_slope;
  }
};

// mean: statistics that are given, of the modalities or of every row of the batch.
void set_sizes(Problem& p, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& mean) {
  STD_TORCH_CHECK(x.dim() >= 2 && weight.dim() == 2 && weight.size(0) >= 1,
                  "cen_ext: x must be [M*N, C, ...], weight [M, C]");
  p.modalities = weight.size(0);
  p.channels = x.size(1);
  STD_TORCH_CHECK(weight.size(1) == p.channels && x.size(0) % p.modalities == 0,
                  "cen_ext: x does not fit weight [M, C]");
  const int64_t samples = x.size(0) / p.modalities;
  if (mean) p.groups = mean->dim() == 2 && mean->size(0) == p.modalities ? 1 : samples;
  if (p.groups == 0) p.groups = samples;
  p.samples = p.groups == 1 ? samples : 1;
  p.spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.spatial *= x.size(d);
}

// Whether a result as large as x is stored past the caches. What is brought back into another layout is read
// again at once.
bool is_streamed(const Tensor& x, bool native) {
  return x.is_cpu() && native &&
         x.numel() * static_cast<int64_t>(x.element_size()) > cpu::last_level_cache() / 8;
}

// What of the problem depends on how x lies in memory.
void set_memory(Problem& p, const Tensor& x, bool channels_last, bool native) {
  p.channels_last = channels_last;
  p.stream = is_streamed(x, native);
}

Sizes sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

void check_as(const char* name, const Tensor& tensor, ScalarType type, const Sizes& sizes, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index() &&
                      tensor.scalar_type() == type && sizes_of(tensor) == sizes,
                  "cen_ext: ", name, " is not of the dtype, sizes and device that x and weight ask for");
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

void check_inputs(const Problem& p, const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                  const std::optional<Tensor>& residual) {
  const ScalarType type = x.scalar_type(),
                   real = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(is_floating(type), "cen_ext: x must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "cen_ext: mean and var go together");
  const Sizes table{p.modalities, p.channels}, statistics{p.units(), p.channels};
  check_as("weight", weight, real, table, x);
  check_as("bias", bias, real, table, x);
  if (mean) check_as("mean", *mean, real, statistics, x);
  if (var) check_as("var", *var, real, statistics, x);
  if (residual) check_as("residual", *residual, type, sizes_of(x), x);
}

// Whether the values lie in memory densely, dimensions nested in the given order.
bool is_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool fit = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return fit;
  };
  if (channels_last && !fits(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 1; --d)
    if (!(channels_last && d == 1) && !fits(d)) return false;
  return fits(0);
}

Sizes strides_of(const Tensor& tensor) { return {tensor.strides().begin(), tensor.strides().end()}; }

Sizes dense_strides(const Sizes& sizes, bool channels_last) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  const auto set = [&](size_t d) {
    strides[d] = next;
    next *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) set(1);
  for (size_t d = sizes.size() - 1; d >= 1; --d)
    if (!(channels_last && d == 1)) set(d);
  set(0);
  return strides;
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

// Not initialised, of a dtype, on the device of `like`. Straight from the allocator: the stable operators of
// the same purpose go through the dispatcher, and a call of ours made five of them.
Tensor empty(const Sizes& sizes, const Sizes& strides, const Tensor& like, int32_t type) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device, like.get_device_index(),
                                                  &handle));
  const Tensor tensor(handle);
  if (like.is_cpu())
    cpu::prefer_large_pages(tensor.mutable_data_ptr(),
                            tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}
Tensor empty_table(const Sizes& sizes, const Tensor& like) {
  return empty(sizes, dense_strides(sizes, false), like, dtype_of(like));
}

Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(packed(*tensor)) : std::nullopt;
}

// The memory layout that the kernels work in, channels first or channels last, and the way there and back.
// What an op returns has the strides of an empty_like of x, as the fake kernels say.
class Layout {
 public:
  explicit Layout(const Tensor& x)
      : like_(is_dense(x, false) || is_dense(x, true) ? x : torch::stable::empty_like(x)) {
    const bool first = is_dense(like_, false), last = is_dense(like_, true);
    const int64_t channels = x.size(1), spatial = x.numel() / (x.size(0) * channels);
    // Where both hold, the longer axis is the one that vectors run along.
    channels_last_ = last && (spatial == 1 || !first);
    // Lines far shorter than a processor's vector cost more than to bring x into the other layout.
    const bool short_lines = x.is_cpu() && spatial < 16 && channels >= 16;
    native_ = channels_last_ || (first && !short_lines);
    channels_last_ |= first && short_lines;
  }

  bool channels_last() const { return channels_last_; }
  bool native() const { return native_; }

  Tensor empty() const { return empty(dtype_of(like_)); }
  Tensor empty(int32_t type) const {
    const Sizes sizes = sizes_of(like_);
    return cen::empty(sizes, native_ ? strides_of(like_) : dense_strides(sizes, channels_last_), like_, type);
  }

  Tensor bring(const Tensor& tensor) const {
    if (is_dense(tensor, channels_last_)) return tensor;
    Tensor dense = empty(dtype_of(tensor));
    torch::stable::copy_(dense, tensor);
    return dense;
  }

  std::optional<Tensor> bring(const std::optional<Tensor>& tensor) const {
    return tensor ? std::optional(bring(*tensor)) : std::nullopt;
  }

  // What empty() made, once it is filled, in the strides that the op promises.
  Tensor give(const Tensor& tensor) const {
    if (native_) return tensor;
    Tensor result = cen::empty(sizes_of(like_), strides_of(like_), like_, dtype_of(tensor));
    torch::stable::copy_(result, tensor);
    return result;
  }

 private:
  Tensor like_;
  bool channels_last_, native_;
};

// How many threads: one for small tensors, where waking the others costs more than it saves.
cpu::Parallel threads_for(const Tensor& x) {
  constexpr int64_t kWorthSharing = 32768;
  const int64_t threads = x.numel() <= kWorthSharing ? 1 : torch::stable::get_num_threads();
  return {threads, [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// f(zero) with a zero of the type that x is of.
template <class F>
void with_type(ScalarType type, F f) {
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::Double) return f(double{});
  if (type == ScalarType::Half) return f(Half{});
  f(BFloat16{});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// ---- where x is: what runs its kernels there ----

#if defined(CEN_CUDA)
// f(plan, device, allocate, stream) with x's device as the current one, on its current stream.
template <class F>
void on_gpu(const Call& call, const Tensor& x, F f) {
  const auto kind = parse<cuda::Kind>("plan", call.plan,
                                      {{"auto", cuda::Kind::automatic},
                                       {"stream", cuda::Kind::stream},
                                       {"cluster", cuda::Kind::cluster},
                                       {"grid", cuda::Kind::grid}});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  std::vector<Tensor> scratch;  // let go with the call: the allocator keeps to the order of the stream
  const cuda::Allocate allocate = [&](int64_t bytes) {
    scratch.push_back(empty_table({bytes / static_cast<int64_t>(x.element_size()) + 1}, x));
    return scratch.back().mutable_data_ptr();
  };
  try {
    f(kind, cuda::current_device(), allocate, stream);
  } catch (const std::invalid_argument& refusal) {
    STD_TORCH_CHECK(false, refusal.what());
  }
}
#endif

template <class T>
void run(const Call& call, const ForwardTensors<T>& t, const Tensor& x) {
  const Problem& p = call.p;
#if defined(CEN_CUDA)
  if (x.is_cuda()) return on_gpu(call, x, [&](auto... how) { cuda::forward(p, t, how...); });
#endif
  cpu::instruction_set().kernels->cpu::KernelsOf<T>::forward(p, t, threads_for(x));
  if (t.running_mean) cpu::update_running(p, t.batch_mean, t.batch_var, t.running_mean, t.running_var);
}

template <class T>
void run(const Call& call, const BackwardTensors<T>& t, const Tensor& x) {
#if defined(CEN_CUDA)
  if (x.is_cuda()) return on_gpu(call, x, [&](auto... how) { cuda::backward(call.p, t, how...); });
#endif
  cpu::instruction_set().kernels->cpu::KernelsOf<T>::backward(call.p, t, threads_for(x));
}

// ---- the ops ----

struct Running {
  Tensor mean, var;
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> mean,
                                           std::optional<Tensor> var, std::optional<Tensor> residual,
                                           const std::optional<Running>& running, Call call) {
  Problem& p = call.p;
  set_sizes(p, x, weight, mean);
  check_inputs(p, x, weight, bias, mean, var, residual);
  p.batch_statistics = !mean;
  const Sizes table = p.batch_statistics ? Sizes{p.units(), p.channels} : Sizes{0};
  if (x.numel() == 0)
    return {torch::stable::empty_like(x), torch::stable::new_zeros(weight, table),
            torch::stable::new_zeros(weight, table)};
  const Tensor batch_mean = empty_table(table, weight), batch_var = empty_table(table, weight);

  const Layout layout(x);
  set_memory(p, x, layout.channels_last(), layout.native());
  x = layout.bring(x);
  residual = layout.bring(residual);
  weight = packed(weight);
  bias = packed(bias);
  mean = packed(mean);
  var = packed(var);
  const Tensor y = layout.empty();
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    run(call,
        ForwardTensors<T>{data<T>(x), data<R>(weight), data<R>(bias), data<R>(mean), data<R>(var),
                          data<T>(residual), mutable_data<T>(y), mutable_data<R>(batch_mean),
                          mutable_data<R>(batch_var), running ? mutable_data<R>(running->mean) : nullptr,
                          running ? mutable_data<R>(running->var) : nullptr},
        x);
  });
  return {layout.give(y), batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor> norm_exchange(Tensor x, Tensor weight, Tensor bias,
                                                 std::optional<Tensor> mean, std::optional<Tensor> var,
                                                 std::optional<Tensor> residual, double threshold,
                                                 StringHandle region, StringHandle criterion,
                                                 StringHandle norm, double eps, StringHandle activation,
                                                 double negative_slope, StringHandle plan) {
  return forward(x, weight, bias, mean, var, residual, std::nullopt,
                 Call({threshold, region, criterion, norm, eps, activation, negative_slope, plan}));
}

std::tuple<Tensor, Tensor, Tensor> norm_exchange_updating(Tensor x, Tensor weight, Tensor bias,
                                                          Tensor running_mean, Tensor running_var,
                                                          std::optional<Tensor> residual, double momentum,
                                                          double threshold, StringHandle region,
                                                          StringHandle criterion, StringHandle norm,
                                                          double eps, StringHandle activation,
                                                          double negative_slope, StringHandle plan) {
  Call call({threshold, region, criterion, norm, eps, activation, negative_slope, plan});
  call.p.momentum = momentum;
  check_as("running_mean", running_mean, weight.scalar_type(), sizes_of(weight), x);
  check_as("running_var", running_var, weight.scalar_type(), sizes_of(weight), x);
  STD_TORCH_CHECK(running_mean.is_contiguous() && running_var.is_contiguous(),
                  "cen_ext: running statistics must be contiguous");
  return forward(x, weight, bias, std::nullopt, std::nullopt, residual, Running{running_mean, running_var},
                 call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_exchange_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, std::optional<Tensor> residual,
    bool batch_statistics, double threshold, StringHandle region, StringHandle criterion, StringHandle norm,
    double eps, StringHandle activation, double negative_slope, StringHandle plan) {
  Call call({threshold, region, criterion, norm, eps, activation, negative_slope, plan});
  Problem& p = call.p;
  set_sizes(p, x, weight, mean);
  check_inputs(p, x, weight, bias, mean, var, residual);
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
  dy = layout.bring(dy);
  x = layout.bring(x);
  residual = layout.bring(residual);
  weight = packed(weight);
  bias = packed(bias);
  mean = packed(mean);
  var = packed(var);
  const Tensor dx = layout.empty();
  const Tensor dresidual = residual ? layout.empty() : none;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    run(call,
        BackwardTensors<T>{data<T>(dy), data<T>(x), data<R>(weight), data<R>(bias), data<R>(mean),
                           data<R>(var), data<T>(residual), mutable_data<T>(dx), mutable_data<R>(dweight),
                           mutable_data<R>(dbias), residual ? mutable_data<T>(dresidual) : nullptr},
        x);
  });
  return {layout.give(dx), dweight, dbias, residual ? layout.give(dresidual) : none};
}

// ---- max pooling: on the CPU alone ----

void check_pooling(const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(x.dim() == 4, "cen_ext: x must be [N, C, H, W]");
  STD_TORCH_CHECK(size % 2 == 1 && 1 <= size && size <= 15, "cen_ext: size must be odd, 1 to 15");
}

cpu::Pooling pooling_of(const Tensor& x, int64_t size, const Layout& layout) {
  const int64_t step = layout.channels_last() ? x.size(1) : 1;
  return {layout.channels_last() ? x.size(0) : x.size(0) * x.size(1),
          x.size(2),
          x.size(3) * step,
          step,
          size,
          is_streamed(x, layout.native())};
}

std::tuple<Tensor, Tensor> max_pool_same(Tensor x, int64_t size) {
  check_pooling(x, size);
  STD_TORCH_CHECK(is_floating(x.scalar_type()), "cen_ext: x must be float16, bfloat16, float32 or float64");
  const int32_t byte = aoti_torch_dtype_uint8();
  if (x.numel() == 0) {
    const Sizes sizes = sizes_of(x), strides = dense_strides(sizes, false);
    return {torch::stable::empty_like(x), empty(sizes, strides, x, byte)};
  }
  const Layout layout(x);
  x = layout.bring(x);
  const Tensor y = layout.empty(), winners = layout.empty(byte);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cpu::instruction_set().kernels->cpu::KernelsOf<T>::max_pool(
        pooling_of(x, size, layout), data<T>(x), mutable_data<T>(y), mutable_data<uint8_t>(winners),
        threads_for(x));
  });
  return {layout.give(y), layout.give(winners)};
}

Tensor max_pool_same_backward(Tensor dy, Tensor winners, int64_t size) {
  check_pooling(winners, size);
  STD_TORCH_CHECK(is_floating(dy.scalar_type()), "cen_ext: dy must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(winners.scalar_type() == ScalarType::Byte, "cen_ext: winners must be uint8");
  check_as("dy", dy, dy.scalar_type(), sizes_of(winners), winners);
  if (dy.numel() == 0) return torch::stable::empty_like(dy);
  const Layout layout(winners);
  dy = layout.bring(dy);
  winners = layout.bring(winners);
  const Tensor dx = layout.empty(dtype_of(dy));
  with_type(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cpu::instruction_set().kernels->cpu::KernelsOf<T>::max_pool_backward(
        pooling_of(dy, size, layout), data<T>(dy), data<uint8_t>(winners), mutable_data<T>(dx),
        threads_for(dy));
  });
  return layout.give(dx);
}

}  // namespace

#define CEN_OPTIONS                                                                                         \
  "float threshold, str region, str criterion, str norm, float eps, str activation, float negative_slope, " \
  "str plan='auto'"

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
  m.def("max_pool_same(Tensor x, int size) -> (Tensor y, Tensor winners)");
  m.def("max_pool_same_backward(Tensor dy, Tensor winners, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) {
  m.impl("norm_exchange", TORCH_BOX(&norm_exchange));
  m.impl("norm_exchange_updating", TORCH_BOX(&norm_exchange_updating));
  m.impl("norm_exchange_backward", TORCH_BOX(&norm_exchange_backward));
  m.impl("max_pool_same", TORCH_BOX(&max_pool_same));
  m.impl("max_pool_same_backward", TORCH_BOX(&max_pool_same_backward));
}

#if defined(CEN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(cen_ext, CUDA, m) {
  m.impl("norm_exchange", TORCH_BOX(&norm_exchange));
  m.impl("norm_exchange_updating", TORCH_BOX(&norm_exchange_updating));
  m.impl("norm_exchange_backward", TORCH_BOX(&norm_exchange_backward));
}
#endif

}  // namespace cen
