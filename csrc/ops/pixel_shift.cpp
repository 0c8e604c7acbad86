// The op torch.ops.cen_ext.pixel_shift: argument checks, allocation and dispatch to CPU or CUDA kernels. The
// public function in cen_ext/ops/pixel_shift/functional.py has already checked the arguments in the caller's
// terms.
#include "../tensors.h"
#if defined(CEN_CUDA)
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace cen {
namespace {

template <class T>
void run(const PixelShift& p, const T* x, const T* base, T* y, const Tensor& like) {
#if defined(CEN_CUDA)
  if (like.is_cuda()) return on_stream(like, [&](void* stream) { cuda::pixel_shift(p, x, base, y, stream); });
#endif
  cpu::instruction_set().of<T>().pixel_shift(p, x, base, y, threads_for(like.numel()));
}

Tensor pixel_shift(Tensor x, std::optional<Tensor> base, int64_t num_modalities, int64_t group,
                   bool adjoint) {
  STD_TORCH_CHECK(x.dim() == 4, "cen_ext: x must be [M*N, C, H, W]");
  STD_TORCH_CHECK(is_floating(x.scalar_type()), "cen_ext: x must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(num_modalities >= 1 && x.size(0) % num_modalities == 0,
                  "cen_ext: the rows of x must divide by the modalities");
  STD_TORCH_CHECK(group >= 0 && kDirections * group <= x.size(1), "cen_ext: group is out of range");
  if (base) check_as("base", *base, x.scalar_type(), sizes_of(x), x);
  if (x.numel() == 0) return torch::stable::empty_like(x);
  const Layout layout(x);
  const PixelShift p{num_modalities,
                     x.size(0) / num_modalities,
                     x.size(1),
                     x.size(2),
                     x.size(3),
                     group,
                     layout.channels_last(),
                     adjoint,
                     is_streamed(x, layout.native())};
  x = layout.to_kernel(x);
  base = layout.to_kernel(base);
  const Tensor y = layout.empty();
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    run(p, data<T>(x), data<T>(base), mutable_data<T>(y), x);
  });
  return layout.from_kernel(y);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cen_ext, m) {
  m.def("pixel_shift(Tensor x, Tensor? base, int num_modalities, int group, bool adjoint) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cen_ext, CPU, m) { m.impl("pixel_shift", TORCH_BOX(&pixel_shift)); }

#if defined(CEN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(cen_ext, CUDA, m) { m.impl("pixel_shift", TORCH_BOX(&pixel_shift)); }
#endif

}  // namespace cen
