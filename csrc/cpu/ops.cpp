#include "../ops.h"

#include "products.h"

STABLE_TORCH_LIBRARY_IMPL(megalora, CPU, m) {
  megalora::implement<megalora::cpu::Products>(m);
  megalora::implement_gated<megalora::cpu::Products>(m);
}
