// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#define CEN_KERNELS baseline
#define CEN_VECTOR_BYTES 16
// x86-64 without AVX2 is rare, and not worth the time that kernels for it take to compile.
#ifdef __x86_64__
#define CEN_ONE_FORM
#endif

#include "table.h"
