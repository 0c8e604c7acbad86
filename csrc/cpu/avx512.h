// What follows is compiled for AVX-512. Standard headers come first, so that none of their code is (vec.h).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define CEN_KERNELS avx512_kernels
#define CEN_HALF_KERNELS avx512_half_kernels
#define CEN_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#define CEN_END_TARGET _Pragma("clang attribute pop")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define CEN_END_TARGET
#endif
