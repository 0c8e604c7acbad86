#if defined(__x86_64__)

// Standard headers come before the target pragma, so that none of their code is compiled for AVX-512 (vec.h).
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define CEN_KERNELS avx512
#define CEN_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
