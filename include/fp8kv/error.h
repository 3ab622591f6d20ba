// The one error of the library and the form of its sentence: which op, which argument, what was expected, what came.
#pragma once

#include <stdexcept>
#include <string>

#include "fp8kv/export.h"

namespace fp8kv {

// Thrown by every validate(), plan and launcher on bad input, before anything is written.
// what() reads "fp8kv::OP: ARGUMENT must EXPECTATION, got ACTUAL".
class FP8KV_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected, const std::string& actual) {
  throw Error(std::string("fp8kv::") + op + ": " + argument + " must " + expected + ", got " + actual);
}

}  // namespace fp8kv
