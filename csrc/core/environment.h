// Environment variables. The rule for all of them: each is read once, at its first use (docs/reference/environment.md).
#pragma once

#include <cstdlib>
#include <string>

namespace fp8kv::core {

// Empty where it is not set. Callers keep the result in a static.
inline std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

inline bool environment_flag(const char* name) { return environment(name) == "1"; }

}  // namespace fp8kv::core
