#define CEN_HALF
#include "avx512.h"
#include "table.h"
