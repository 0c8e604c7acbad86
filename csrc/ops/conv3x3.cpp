// The ops torch.ops.cen_ext.conv3x3*: Winograd convolution, on the CPU only. The public functions in
// cen_ext/ops/conv3x3.py have already checked the arguments in the caller's terms.
#include <algorithm>

#include "../tensors.h"

namespace cen {
namespace {

// Describes the convolution of x (or a tensor of its spatial size) with weight [K, C, 3, 3].
cpu::Convolution convolution_of(const Tensor& x, const Sizes& weight, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.size() == 4 && weight[2] == 3 && weight[3] == 3,
                  "cen_ext: x must be [N, C, H, W], weight [K, C, 3, 3]");
  for (const int64_t channels : {weight[0], weight[1]})
    STD_TORCH_CHECK(channels > 0 && channels % 32 == 0, "cen_ext: channels must be multiples of 32");
  STD_TORCH_CHECK(dilation >= 1, "cen_ext: dilation must be positive");
  // At a dilation of the longer image side or more, only the center tap lies inside the image.
  const int64_t furthest = std::max({x.size(2), x.size(3), int64_t{1}});
  return {x.size(0), x.size(2), x.size(3), weight[1], weight[0], std::min(dilation, furthest)};
}

Tensor empty_channels_last(const Sizes& sizes, const Tensor& like) {
  return empty(sizes, dense_strides(sizes, true), like, dtype_of(like));
}

// The kernels require dense channels-last tensors.
Tensor channels_last(const Tensor& tensor) {
  if (is_dense(tensor, true)) return tensor;
  Tensor dense = empty_channels_last(sizes_of(tensor), tensor);
  torch::stable::copy_(dense, tensor);
  return dense;
}

// Threads for an elementwise op of equal cost: about 32 multiply-adds per value.
cpu::Parallel threads_of(const cpu::Convolution& p) {
  return threads_for(p.images * p.rows * p.columns * p.inputs * p.outputs / 32);
}

Tensor conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t dilation) {
  const cpu::Convolution p = convolution_of(x, sizes_of(weight), dilation);
  check_as("x", x, ScalarType::Float, {p.images, p.inputs, p.rows, p.columns}, x);
  check_as("weight", weight, ScalarType::Float, sizes_of(weight), x);
  if (bias) check_as("bias", *bias, ScalarType::Float, {p.outputs}, x);
  const Tensor y = empty_channels_last({p.images, p.outputs, p.rows, p.columns}, x);
  if (y.numel() == 0) return y;
  x = channels_last(x);
  weight = channels_last(weight);
  bias = packed(bias);
  cpu::instruction_set().kernels->convolve(p, data<float>(x), data<float>(weight), data<float>(bias),
                                           mutable_data<float>(y), threads_of(p));
  return y;
}

Tensor conv3x3_backward(Tensor dy, Tensor weight, int64_t dilation) {
  const cpu::Convolution p = convolution_of(dy, sizes_of(weight), dilation);
  check_as("dy", dy, ScalarType::Float, {p.images, p.outputs, p.rows, p.columns}, dy);
  check_as("weight", weight, ScalarType::Float, sizes_of(weight), dy);
  const Tensor dx = empty_channels_last({p.images, p.inputs, p.rows, p.columns}, dy);
  if (dx.numel() == 0) return dx;
  dy = channels_last(dy);
  weight = channels_last(weight);
  cpu::instruction_set().kernels->convolve_backward(p, data<float>(dy), data<float>(weight),
                                                    mutable_data<float>(dx), threads_of(p));
  return dx;
}

Tensor conv3x3_weight_gradient(Tensor dy, Tensor x, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && dy.dim() == 4, "cen_ext: x and dy must be [N, C, H, W]");
  const Sizes weight{dy.size(1), x.size(1), 3, 3};
  const cpu::Convolution p = convolution_of(x, weight, dilation);
  check_as("x", x, ScalarType::Float, sizes_of(x), x);
  check_as("dy", dy, ScalarType::Float, {p.images, p.outputs, p.rows, p.columns}, x);
  Tensor dweight = empty_channels_last(weight, x);
  if (x.numel() == 0) return torch::stable::zero_(dweight);
  dy = channels_last(dy);
  x = channels_last(x);
  cpu::instruction_set().kernels->convolve_weight_gradient(p, data<float>(dy), data<float>(x),
                                                           mutable_data<float>(dweight), threads_of(p));
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cen_ext, m) {
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor");
  m.def("conv3x3_backward(Tensor dy, Tensor weight, int dilation) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor dy, Tensor x, int dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace cen
