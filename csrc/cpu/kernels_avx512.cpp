#include "avx512.h"
#include "table.h"
