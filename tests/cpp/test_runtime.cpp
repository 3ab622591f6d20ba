// What a build says about itself, and the choice of the instruction set.
#include "fp8kv/runtime.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "fp8kv/version.h"
#include "support.h"

namespace fp8kv {
namespace {

using testing_support::error_of;

TEST(Version, OfTheLibraryIsThatOfItsHeaders) {
  EXPECT_STREQ(version(), FP8KV_VERSION_STRING);
  const std::string numbers = std::to_string(FP8KV_VERSION_MAJOR) + "." + std::to_string(FP8KV_VERSION_MINOR) + "." +
                              std::to_string(FP8KV_VERSION_PATCH);
  EXPECT_EQ(version(), numbers);
  EXPECT_EQ(version(), std::string(FP8KV_TEST_PROJECT_VERSION)) << "the version that CMake read";
}

TEST(CpuIsaChoice, GenericIsAlwaysThereAndTheBestComesLast) {
  const std::vector<cpu::Isa> available = cpu::available();
  ASSERT_FALSE(available.empty());
  EXPECT_EQ(available.front(), cpu::Isa::Generic);
  EXPECT_TRUE(std::is_sorted(available.begin(), available.end()));
}

TEST(CpuIsaChoice, Names) {
  EXPECT_STREQ(cpu::name(cpu::Isa::Generic), "generic");
  EXPECT_STREQ(cpu::name(cpu::Isa::AVX2), "avx2");
  EXPECT_STREQ(cpu::name(cpu::Isa::AVX512), "avx512");
}

TEST(CpuIsaChoice, OneThatIsNotThereIsRefused) {
  const std::vector<cpu::Isa> available = cpu::available();
  const cpu::Isa before = cpu::active();
  for (cpu::Isa isa : {cpu::Isa::Generic, cpu::Isa::AVX2, cpu::Isa::AVX512}) {
    if (std::find(available.begin(), available.end(), isa) != available.end()) continue;
    EXPECT_NE(error_of([&] { cpu::force(isa); }), "") << cpu::name(isa);
    EXPECT_EQ(cpu::active(), before);
  }
}

}  // namespace
}  // namespace fp8kv
