#include "default.h"
#include "table.h"
