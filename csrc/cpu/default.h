// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#pragma once

#define CEN_KERNELS default_kernels
#define CEN_HALF_KERNELS default_half_kernels
#define CEN_VECTOR_BYTES 16
#define CEN_END_TARGET
// x86-64 without AVX2 is rare, and not worth the time that kernels for it take to compile.
#ifdef __x86_64__
#define CEN_ONE_FORM
#endif
