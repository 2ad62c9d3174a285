#include "../ops.h"

#include "products.h"

TORCH_LIBRARY_IMPL(megalora, CPU, m) { megalora::implement<megalora::cpu::Products>(m); }
