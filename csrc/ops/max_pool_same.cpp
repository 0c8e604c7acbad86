// The ops torch.ops.cen_ext.max_pool_same*, on the CPU only. The public functions in
// cen_ext/ops/max_pool_same/functional.py have already checked the arguments in the caller's terms.
#include <tuple>

#include "../tensors.h"

namespace cen {
namespace {

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
  x = layout.to_kernel(x);
  const Tensor y = layout.empty(), winners = layout.empty(byte);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cpu::instruction_set().of<T>().max_pool(pooling_of(x, size, layout), data<T>(x), mutable_data<T>(y),
                                            mutable_data<uint8_t>(winners), threads_for(x.numel()));
  });
  return {layout.from_kernel(y), layout.from_kernel(winners)};
}

Tensor max_pool_same_backward(Tensor dy, Tensor winners, int64_t size) {
  check_pooling(winners, size);
  STD_TORCH_CHECK(is_floating(dy.scalar_type()), "cen_ext: dy must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(winners.scalar_type() == ScalarType::Byte, "cen_ext: winners must be uint8");
  check_as("dy", dy, dy.scalar_type(), sizes_of(winners), winners);
  if (dy.numel() == 0) return torch::stable::empty_like(dy);
  const Layout layout(winners);
  dy = layout.to_kernel(dy);
  winners = layout.to_kernel(winners);
  const Tensor dx = layout.empty(dtype_of(dy));
  with_type(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cpu::instruction_set().of<T>().max_pool_backward(pooling_of(dy, size, layout), data<T>(dy),
                                                     data<uint8_t>(winners), mutable_data<T>(dx),
                                                     threads_for(dy.numel()));
  });
  return layout.from_kernel(dx);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cen_ext, m) {
  m.def("max_pool_same(Tensor x, int size) -> (Tensor y, Tensor winners)");
  m.def("max_pool_same_backward(Tensor dy, Tensor winners, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) {
  m.impl("max_pool_same", TORCH_BOX(&max_pool_same));
  m.impl("max_pool_same_backward", TORCH_BOX(&max_pool_same_backward));
}

}  // namespace cen
