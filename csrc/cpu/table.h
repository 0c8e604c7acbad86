// Defines kernels of the instruction set whose header (default.h, avx2.h, avx512.h) has been included: those
// of float and double, or with CEN_HALF those of Half and BFloat16.
#pragma once

#include "conv3x3/conv3x3.h"
#include "max_pool_same.h"
#include "norm_exchange/layer.h"
#include "pixel_shift.h"

namespace cen::cpu {

template <class T>
constexpr KernelsOf<T> kernels_of() {
  return {normalize<T>, normalize_backward<T>, max_pool<T>, max_pool_backward<T>, pixel_shift<T>};
}

#if defined(CEN_HALF)
extern const HalfKernels CEN_HALF_KERNELS;
const HalfKernels CEN_HALF_KERNELS = {kernels_of<Half>(), kernels_of<BFloat16>()};
#else
extern const Kernels CEN_KERNELS;
const Kernels CEN_KERNELS = {kernels_of<float>(), kernels_of<double>(), convolve, convolve_backward,
                             convolve_weight_gradient};
#endif

}  // namespace cen::cpu

CEN_END_TARGET
