// fp8kv._introspect: the C++ library as tests, `fp8kv doctor` and `fp8kv bench` see it - versions, instruction sets, the scalar
// codec, plans.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "core/dispatch.h"
#include "core/plan.h"
#include "fp8kv/runtime.h"

namespace py = pybind11;

namespace {

using fp8kv::DType;
namespace core = fp8kv::core;

// By a name of a cache format, with or without "fp8_".
DType format(const std::string& name) {
  for (const core::CacheFormat& known : core::kCacheFormats)
    if (core::is_quantized(known.dtype) && (known.name == name || known.name == "fp8_" + name)) return known.dtype;
  throw py::value_error("format must be 'e4m3', 'e5m2' or 'int8', got '" + name + "'");
}

DType dtype(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::Other); ++i)
    if (const auto d = static_cast<DType>(i); name == fp8kv::name(d) && (core::is_real(d) || core::is_quantized(d))) return d;
  throw py::value_error("dtype must be " + core::names_of(core::RealTypes{}) + ", or " +
                        core::names_of(core::QuantizedTypes{}) + ", got '" + name + "'");
}

std::uint8_t encode(float value, DType type) {
  std::uint8_t bits = 0;
  core::visit_quantized(type, [&]<class T>(core::Type<T>) { bits = fp8kv::encode<T>(value).bits; });
  return bits;
}

float decode(std::uint8_t byte, DType type) {
  float value = 0.0f;
  core::visit_quantized(type, [&]<class T>(core::Type<T>) { value = fp8kv::decode(T{byte}); });
  return value;
}

py::array_t<std::uint8_t> encode_array(const py::array_t<float, py::array::c_style>& values, const std::string& name) {
  const DType type = format(name);
  py::array_t<std::uint8_t> bytes(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) bytes.mutable_data()[i] = encode(values.data()[i], type);
  return bytes;
}

fp8kv::cpu::Isa isa(const std::string& name) {
  for (auto candidate : fp8kv::cpu::available())
    if (name == fp8kv::cpu::name(candidate)) return candidate;
  throw py::value_error("instruction set must be one of those of cpu_isas(), got '" + name + "'");
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto candidate : fp8kv::cpu::available()) names.emplace_back(fp8kv::cpu::name(candidate));
  return names;
}

// The plan for a contiguous matrix, as a dict.
py::dict plan_quantize(std::int64_t rows, std::int64_t cols, std::pair<std::int64_t, std::int64_t> group_shape,
                       const std::string& input, const std::string& result, int multiprocessors) {
  const auto count = [](std::int64_t size, std::int64_t group) { return group == -1 ? 1 : (size + group - 1) / group; };
  // Plans depend on addresses only through their alignment; nothing is read. The three ranges are kept apart.
  const auto at = [](std::uintptr_t terabytes) { return reinterpret_cast<void*>(terabytes << 40); };
  const fp8kv::StaticQuantize problem{
      .result = fp8kv::contiguous(at(1), dtype(result), {rows, cols}),
      .input = fp8kv::contiguous(at(2), dtype(input), {rows, cols}),
      .scale = fp8kv::contiguous(at(3), DType::Float32, {count(rows, group_shape.first), count(cols, group_shape.second)}),
      .group_shape = fp8kv::GroupShape{group_shape.first, group_shape.second},
  };
  const core::Chunk whole{core::lower(problem)};
  const core::ElementwisePlan plan =
      core::plan_elementwise(whole, problem.input, problem.result, problem.scale, multiprocessors);
  py::dict d;
  d["path"] = core::name(plan.path);
  d["aligned"] = plan.aligned;
  d["rows_per_thread"] = plan.rows_per_thread;
  d["threads"] = plan.threads;
  d["blocks"] = plan.blocks;
  return d;
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "What the C++ library is made of: versions, instruction sets, the scalar codec and launch plans.";
  m.def("version", &fp8kv::version);
  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("cpu_isa", [] { return std::string(fp8kv::cpu::name(fp8kv::cpu::active())); });
  m.def("cpu_isas", &isas);
  m.def("force_cpu_isa", [](const std::string& name) { fp8kv::cpu::force(isa(name)); });
  m.def("encode", [](float value, const std::string& name) { return encode(value, format(name)); });
  m.def("decode", [](std::uint8_t byte, const std::string& name) { return decode(byte, format(name)); });
  m.def("encode_array", &encode_array);
  m.def("plan_quantize", &plan_quantize, py::arg("rows"), py::arg("cols"), py::arg("group_shape"),
        py::arg("input") = "bfloat16", py::arg("result") = "float8_e4m3fn", py::arg("multiprocessors") = 132);
}
