#if defined(__x86_64__)

// Standard headers come before the target pragma, so that none of their code is compiled for AVX2 (vec.h).
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define CEN_KERNELS avx2
#define CEN_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
