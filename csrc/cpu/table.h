// Defines the kernel table CEN_KERNELS for the instruction set that the including file has chosen with
// CEN_VECTOR_BYTES and the compiler's target.
#pragma once

#include "conv3x3/conv3x3.h"
#include "max_pool_same.h"
#include "norm_exchange/layer.h"
#include "pixel_shift.h"

namespace cen::cpu {

const Kernels CEN_KERNELS = {
    {normalize<float>, normalize_backward<float>, max_pool<float>, max_pool_backward<float>,
     pixel_shift<float>},
    {normalize<double>, normalize_backward<double>, max_pool<double>, max_pool_backward<double>,
     pixel_shift<double>},
    {normalize<Half>, normalize_backward<Half>, max_pool<Half>, max_pool_backward<Half>, pixel_shift<Half>},
    {normalize<BFloat16>, normalize_backward<BFloat16>, max_pool<BFloat16>, max_pool_backward<BFloat16>,
     pixel_shift<BFloat16>},
    convolve,
    convolve_backward,
    convolve_weight_gradient};

}  // namespace cen::cpu
