// Checks of arguments, shared by all problems. Each throws Error with a sentence that names the op and the argument.
#pragma once

#include <initializer_list>
#include <string>

#include "fp8kv/error.h"
#include "fp8kv/views.h"

namespace fp8kv::core {

// Throws Error: "fp8kv::OP: ARGUMENT must EXPECTED, got ACTUAL".
[[noreturn]] FP8KV_API void fail(const char* op, const char* argument, const std::string& expected, const std::string& actual);

// A tensor argument with the names its errors use.
struct Argument {
  const char* op;
  const char* name;
  const TensorView& view;
};

// That a view can be read: at most kMaxDims dimensions, no negative size or stride, an address unless it is empty, elements
// aligned to their size (PyTorch's always are; plain pointers may not be).
void check_view(const Argument& a);

void check_real(const Argument& a);
void check_quantized(const Argument& a);
void check_float32(const Argument& a);

// That a view is on the device that an operation is to run on.
FP8KV_API void check_on_device(const Argument& a, Device current);

void check_same_device(const Argument& a, const Argument& other);
void check_same_shape(const Argument& a, const Argument& other);

// That a written view has no two indices for one element, as in expand().
void check_no_self_overlap(const Argument& a);

// False only where the two certainly share no byte: disjoint ranges, or rows of the same pitches that lie next to each other
// (slices of one tensor in any of its dimensions).
bool may_overlap(const TensorView& a, const TensorView& b);
void check_no_overlap(const Argument& written, const Argument& other);

// That no written view overlaps itself, another written one, or one that is read.
void check_written(std::initializer_list<const Argument*> written, std::initializer_list<const Argument*> read);

}  // namespace fp8kv::core
