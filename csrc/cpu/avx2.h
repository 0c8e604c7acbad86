// What follows is compiled for AVX2. Standard headers come first, so that none of their code is (vec.h).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define CEN_KERNELS avx2_kernels
#define CEN_HALF_KERNELS avx2_half_kernels
#define CEN_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#define CEN_END_TARGET _Pragma("clang attribute pop")
#else
#pragma GCC target("avx2,fma,f16c")
#define CEN_END_TARGET
#endif
