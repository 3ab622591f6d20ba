// Quantizes two rows with a scale each, and back. Bad arguments give one sentence.
#include <fp8kv/error.h>
#include <fp8kv/quantize.h>

#include <cstdio>
#include <vector>

int main() {
  using fp8kv::DType;
  const std::int64_t tokens = 2, hidden = 4;
  const std::vector<float> x = {1.0f, -2.0f, 3.0f, 448.0f, 0.5f, 0.25f, -7.0f, 0.0f};
  std::vector<fp8kv::E4M3> q(x.size());
  std::vector<float> scales(tokens), back(x.size());

  // One scale for each row, found from the data.
  fp8kv::cpu::run(fp8kv::DynamicQuantize{
      .result = fp8kv::contiguous(q.data(), DType::E4M3, {tokens, hidden}),
      .input = fp8kv::contiguous(x.data(), DType::Float32, {tokens, hidden}),
      .scale = fp8kv::contiguous(scales.data(), DType::Float32, {tokens}),
      .group_shape = fp8kv::GroupShape{1, -1},
  });
  fp8kv::cpu::run(fp8kv::Dequantize{
      .result = fp8kv::contiguous(back.data(), DType::Float32, {tokens, hidden}),
      .input = fp8kv::contiguous(q.data(), DType::E4M3, {tokens, hidden}),
      .scale = fp8kv::contiguous(scales.data(), DType::Float32, {tokens}),
      .group_shape = fp8kv::GroupShape{1, -1},
  });
  for (std::size_t i = 0; i < x.size(); ++i)
    std::printf("%8.3f -> 0x%02x -> %8.3f (scale %g)\n", x[i], q[i].bits, back[i], scales[i / hidden]);

  // Bad arguments throw fp8kv::Error, whose sentence names the argument.
  try {
    fp8kv::cpu::run(fp8kv::StaticQuantize{
        .result = fp8kv::contiguous(q.data(), DType::E4M3, {tokens, hidden}),
        .input = fp8kv::contiguous(x.data(), DType::Float32, {tokens, hidden}),
        .scale = fp8kv::contiguous(scales.data(), DType::Float32, {tokens}),
    });
  } catch (const fp8kv::Error& error) {
    std::printf("%s\n", error.what());
  }
}
