// What several tests share.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "fp8kv/error.h"

namespace fp8kv::testing_support {

// The sentence of the Error that `body` throws; "" when it throws none.
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace fp8kv::testing_support
