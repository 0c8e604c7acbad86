#define CEN_HALF
#include "default.h"
#include "table.h"
