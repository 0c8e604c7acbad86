// Defines the table of kernels `CEN_KERNELS` of the instruction set that the including file has chosen by
// CEN_VECTOR_BYTES and the compiler's target.
#pragma once

#include "backward.h"

namespace cen::cpu {

const Kernels CEN_KERNELS = {{forward<float>, backward<float>},
                             {forward<double>, backward<double>},
                             {forward<Half>, backward<Half>},
                             {forward<BFloat16>, backward<BFloat16>}};

}  // namespace cen::cpu
