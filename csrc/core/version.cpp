#include "fp8kv/runtime.h"

namespace fp8kv {

const char* version() { return FP8KV_VERSION; }

}  // namespace fp8kv
