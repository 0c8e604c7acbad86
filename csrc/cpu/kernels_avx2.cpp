#include "avx2.h"
#include "table.h"
