#define CEN_HALF
#include "avx2.h"
#include "table.h"
