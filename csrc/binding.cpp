// The ops torch.ops.cen_ext.*, through LibTorch's stable ABI: one build serves every torch from 2.10 on.
// The only file that sees tensors: it checks them, allocates results, picks the memory layout.
// Public functions check arguments in the caller's words before (cen_ext/functional.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

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

// What the ops' options say of the problem.
Problem parse_options(double threshold, StringHandle region, StringHandle criterion, StringHandle norm,
                      double eps, StringHandle activation, double negative_slope) {
  Problem p{};
  const std::string region_text = take(region), criterion_text = take(criterion), norm_text = take(norm),
                    activation_text = take(activation);
  p.threshold = threshold;
  p.region = parse<Region>("region", region_text, {{"own", Region::own}, {"all", Region::all}});
  p.criterion = parse<Criterion>("criterion", criterion_text,
                                 {{"abs", Criterion::magnitude}, {"signed", Criterion::signed_value}});
  STD_TORCH_CHECK(norm_text == "batch", "cen_ext: the CPU kernels cover norm 'batch', not '", norm_text, "'");
  p.eps = eps;
  p.activation = parse<Activation>("activation", activation_text,
                                   {{"identity", Activation::identity},
                                    {"relu", Activation::relu},
                                    {"leaky_relu", Activation::leaky_relu}});
  p.negative_slope = negative_slope;
  return p;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  return Sizes(a.sizes().begin(), a.sizes().end()) == Sizes(b.sizes().begin(), b.sizes().end());
}

void set_sizes(Problem& p, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 2 && weight.dim() == 2 && weight.size(0) >= 1,
                  "cen_ext: x must be [M*N, C, ...], weight [M, C]");
  p.modalities = weight.size(0);
  p.channels = x.size(1);
  STD_TORCH_CHECK(weight.size(1) == p.channels && x.size(0) % p.modalities == 0,
                  "cen_ext: x does not fit weight [M, C]");
  p.samples = x.size(0) / p.modalities;
  p.spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.spatial *= x.size(d);
}

// The tensor is on the CPU, of dtype and sizes of `like`.
void check_as(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && same_sizes(tensor, like),
                  "cen_ext: ", name, " is not of the dtype, sizes and device that x and weight ask for");
}

void check_inputs(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                  const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && x.scalar_type() == weight.scalar_type() &&
                      (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
                  "cen_ext: x and weight must both be float32 or float64, on the CPU");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "cen_ext: mean and var go together");
  check_as("bias", bias, weight);
  if (mean) check_as("mean", *mean, weight);
  if (var) check_as("var", *var, weight);
  if (residual) check_as("residual", *residual, x);
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

// The memory layout that the kernels work in. It is that of an empty_like of x, which is what the fake
// kernels return, or contiguous where that is neither channels first nor channels last.
class Layout {
 public:
  Layout(const Tensor& x, const Problem& p)
      : like_(is_dense(x, false) || is_dense(x, true) ? x : torch::stable::empty_like(x)),
        // Where both hold, the longer axis is the one that vectors run along.
        channels_last_(is_dense(like_, true) && (p.spatial == 1 || !is_dense(like_, false))),
        native_(channels_last_ || is_dense(like_, false)) {}

  bool channels_last() const { return channels_last_; }

  Tensor empty() const {
    if (native_) return torch::stable::empty_like(like_);
    return torch::stable::empty(like_.sizes(), like_.scalar_type());
  }

  Tensor bring(const Tensor& tensor) const {
    if (is_dense(tensor, channels_last_)) return tensor;
    Tensor dense = empty();
    torch::stable::copy_(dense, tensor);
    return dense;
  }

  std::optional<Tensor> bring(const std::optional<Tensor>& tensor) const {
    return tensor ? std::optional(bring(*tensor)) : std::nullopt;
  }

  // What empty() made, once it is filled, in the strides that the op promises.
  Tensor give(const Tensor& tensor) const {
    if (native_) return tensor;
    Tensor result = torch::stable::empty_like(like_);
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
  const int64_t threads = x.numel() < kWorthSharing ? 1 : torch::stable::get_num_threads();
  return {threads, [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
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

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> norm_exchange(Tensor x, Tensor weight, Tensor bias,
                                                 std::optional<Tensor> mean, std::optional<Tensor> var,
                                                 std::optional<Tensor> residual, double threshold,
                                                 StringHandle region, StringHandle criterion,
                                                 StringHandle norm, double eps, StringHandle activation,
                                                 double negative_slope) {
  Problem p = parse_options(threshold, region, criterion, norm, eps, activation, negative_slope);
  check_inputs(x, weight, bias, mean, var, residual);
  set_sizes(p, x, weight);
  p.batch_statistics = !mean;
  const Sizes table = p.batch_statistics ? Sizes{p.modalities, p.channels} : Sizes{0};
  Tensor batch_mean = torch::stable::new_zeros(weight, table),
         batch_var = torch::stable::new_zeros(weight, table);
  if (x.numel() == 0) return {torch::stable::empty_like(x), batch_mean, batch_var};

  const Layout layout(x, p);
  p.channels_last = layout.channels_last();
  x = layout.bring(x);
  residual = layout.bring(residual);
  weight = torch::stable::contiguous(weight);
  bias = torch::stable::contiguous(bias);
  mean = contiguous(mean);
  var = contiguous(var);
  const Tensor y = layout.empty();
  const auto run = [&](auto zero, auto kernel) {
    using T = decltype(zero);
    kernel(p,
           {data<T>(x), data<T>(weight), data<T>(bias), data<T>(mean), data<T>(var), data<T>(residual),
            mutable_data<T>(y), mutable_data<T>(batch_mean), mutable_data<T>(batch_var)},
           threads_for(x));
  };
  const cpu::Kernels& kernels = *cpu::instruction_set().kernels;
  if (x.scalar_type() == ScalarType::Float)
    run(float{}, kernels.forward_float);
  else
    run(double{}, kernels.forward_double);
  return {layout.give(y), batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_exchange_backward(
    Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, std::optional<Tensor> residual,
    bool batch_statistics, double threshold, StringHandle region, StringHandle criterion, StringHandle norm,
    double eps, StringHandle activation, double negative_slope) {
  Problem p = parse_options(threshold, region, criterion, norm, eps, activation, negative_slope);
  check_inputs(x, weight, bias, mean, var, residual);
  check_as("dy", dy, x);
  set_sizes(p, x, weight);
  p.batch_statistics = batch_statistics;
  Tensor dweight = torch::stable::new_zeros(weight, weight.sizes());
  Tensor dbias = torch::stable::new_zeros(weight, weight.sizes());
  Tensor none = torch::stable::new_zeros(x, {0});
  if (x.numel() == 0)
    return {torch::stable::empty_like(x), dweight, dbias, residual ? torch::stable::empty_like(x) : none};

  const Layout layout(x, p);
  p.channels_last = layout.channels_last();
  dy = layout.bring(dy);
  x = layout.bring(x);
  residual = layout.bring(residual);
  weight = torch::stable::contiguous(weight);
  bias = torch::stable::contiguous(bias);
  mean = torch::stable::contiguous(mean);
  var = torch::stable::contiguous(var);
  const Tensor dx = layout.empty();
  const Tensor dresidual = residual ? layout.empty() : none;
  const auto run = [&](auto zero, auto kernel) {
    using T = decltype(zero);
    kernel(p,
           {data<T>(dy), data<T>(x), data<T>(weight), data<T>(bias), data<T>(mean), data<T>(var),
            data<T>(residual), mutable_data<T>(dx), mutable_data<T>(dweight), mutable_data<T>(dbias),
            residual ? mutable_data<T>(dresidual) : nullptr},
           threads_for(x));
  };
  const cpu::Kernels& kernels = *cpu::instruction_set().kernels;
  if (x.scalar_type() == ScalarType::Float)
    run(float{}, kernels.backward_float);
  else
    run(double{}, kernels.backward_double);
  return {layout.give(dx), dweight, dbias, residual ? layout.give(dresidual) : none};
}

}  // namespace

STABLE_TORCH_LIBRARY(cen_ext, m) {
  m.def(
      "norm_exchange(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, Tensor? residual, "
      "float threshold, str region, str criterion, str norm, float eps, str activation, float "
      "negative_slope) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_exchange_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, "
      "Tensor? residual, bool batch_statistics, float threshold, str region, str criterion, str norm, float "
      "eps, "
      "str activation, float negative_slope) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) {
  m.impl("norm_exchange", TORCH_BOX(&norm_exchange));
  m.impl("norm_exchange_backward", TORCH_BOX(&norm_exchange_backward));
}

}  // namespace cen
