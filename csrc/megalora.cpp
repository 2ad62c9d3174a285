#include "schemas.h"

STABLE_TORCH_LIBRARY(megalora, m) { megalora::define_ops(m); }
