// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#define CEN_KERNELS baseline
#define CEN_VECTOR_BYTES 16

#include "table.h"
