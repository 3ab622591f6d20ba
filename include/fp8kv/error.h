// The library's exception type and the form of its messages.
#pragma once

#include <stdexcept>

#include "fp8kv/export.h"

namespace fp8kv {

// Thrown by every validate() and launcher on bad input, before anything is written. what() is one sentence:
// "fp8kv::OP: ARGUMENT must EXPECTATION, got ACTUAL".
class FP8KV_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace fp8kv
