#include "schemas.h"

TORCH_LIBRARY(megalora, m) { megalora::define_ops(m); }
