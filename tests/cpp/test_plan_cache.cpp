// Plans of appends to the paged cache and of gathers from it.
#include <gtest/gtest.h>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

TEST(PlanCache, HeadsOfWholeVectorsAreAligned) {
  const CachePlan plan = plan_append(lower(append_of({128, 8, 128})).front());
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.vecs_per_head, 16);
  EXPECT_EQ(plan.tokens, 128);
}

TEST(PlanCache, OddHeadsOfOneScaleAreOneAlignedRow) {
  EXPECT_FALSE(plan_append(lower(append_of({16, 8, 20})).front()).aligned);
  const CachePlan merged = plan_append(lower(append_of({16, 8, 20, 64, 16, false})).front());
  EXPECT_TRUE(merged.aligned);
  EXPECT_EQ(merged.vecs_per_head, 20);
}

TEST(PlanCache, MisalignedRowsAreDividedAtAlignedAddresses) {
  const CachePlan plan = plan_append(lower(append_of({16, 8, 128, 64, 16, true, 1})).front());
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_FALSE(plan.aligned);
  EXPECT_EQ(plan.vecs_per_head, 17);  // 128 elements that begin up to 7 into a vector
}

TEST(PlanCache, StridesOfSizeOneDoNotMatter) {
  CacheAppend p = append_of({16, 1, 128});
  p.key.strides[1] = p.key_cache.strides[2] = 3;
  EXPECT_TRUE(plan_append(lower(p).front()).aligned);
}

// Where all is aligned, kernels have strides of 32 bits.
TEST(PlanCache, StridesOf4GiBAreNotAligned) {
  constexpr std::int64_t kBytes = std::int64_t{1} << 32;
  const auto aligned = [](auto change, std::int64_t tokens = 16) {
    CacheAppend p = append_of({tokens, 2, 64});
    change(p);
    const bool appends = plan_append(lower(p).front()).aligned;
    EXPECT_EQ(plan_gather(lower(p).front()).aligned, appends);
    return appends;
  };
  EXPECT_TRUE(aligned([](CacheAppend& p) { p.key.strides[0] = kBytes / 2 - 8; }));
  EXPECT_FALSE(aligned([](CacheAppend& p) { p.key.strides[0] = kBytes / 2; }));
  EXPECT_TRUE(aligned([](CacheAppend& p) { p.key.strides[0] = kBytes / 2; }, 1)) << "of one token";
  EXPECT_FALSE(aligned([](CacheAppend& p) { p.value.strides[1] = kBytes / 2; }));
  for (int d : {0, 1, 2}) EXPECT_FALSE(aligned([d](CacheAppend& p) { p.value_cache.strides[d] = kBytes; })) << d;
  EXPECT_FALSE(aligned([](CacheAppend& p) { p.k_scale.strides[0] = kBytes / 4; }));
  CacheAppend p = append_of({16, 2, 64});
  p.k_offset = channels_of({16, 2, 64}, 9);
  p.k_offset->strides[0] = kBytes / 4;
  EXPECT_EQ(plan_append(lower(p).front()).path, KernelPath::Scalar);
  EXPECT_EQ(plan_gather(lower(p).front()).path, KernelPath::Scalar);
}

TEST(PlanCache, SpacedElementsGoOneByOne) {
  CacheAppend p = append_of({16, 2, 64});
  for (int d = 0; d < 3; ++d) p.key.strides[d] *= 2;
  EXPECT_EQ(plan_append(lower(p).front()).path, KernelPath::Scalar);
}

TEST(PlanCache, SlotsBeyond32BitsGoOneByOne) {
  constexpr std::int64_t kSlots = std::int64_t{1} << 31;
  EXPECT_EQ(plan_append(lower(append_of({16, 1, 8, kSlots / 16, 16})).front()).path, KernelPath::Vectorized);
  EXPECT_EQ(plan_append(lower(append_of({16, 1, 8, kSlots / 16 + 1, 16})).front()).path, KernelPath::Scalar);
}

TEST(PlanCache, ManyTokensAreLaunchedInChunks) {
  const std::int64_t tokens = 1 << 25;  // of 128 vectors
  const CachePlan plan = plan_append(lower(append_of({tokens, 8, 128})).front());
  EXPECT_LT(plan.tokens, tokens);
  EXPECT_LT(plan.tokens * 128, kMaxChunk);
  EXPECT_GE((plan.tokens + 1) * 128, kMaxChunk);
}

CachePlan plan_dynamic_append(std::int64_t head_size) {
  const CacheAppend p = append_of({128, 8, head_size});
  const TensorView scales = contiguous(address(7), DType::Float32, {64, 16, 8});
  TensorView others = scales;
  others.data = address(8);
  return plan_append_dynamic(
      lower(CacheAppendDynamic{p.key, p.value, p.key_cache, p.value_cache, scales, others, p.slot_mapping}).front());
}

TEST(PlanCache, ThreadsOfAWarpHoldAHead) {
  struct Expected {
    std::int64_t head_size;
    int threads, vecs;
  };
  for (const auto& [head_size, threads, vecs] :
       {Expected{8, 1, 2}, {64, 4, 2}, {80, 8, 2}, {128, 8, 2}, {256, 16, 2}, {512, 32, 2}, {576, 32, 4}, {1024, 32, 4}}) {
    const CachePlan plan = plan_dynamic_append(head_size);
    EXPECT_EQ(plan.path, KernelPath::Vectorized) << head_size;
    EXPECT_EQ(plan.threads_per_head, threads) << head_size;
    EXPECT_EQ(plan.vecs_per_thread, vecs) << head_size;
    EXPECT_GE(plan.threads_per_head * plan.vecs_per_thread, plan.vecs_per_head) << head_size;
  }
}

TEST(PlanCache, LargeDynamicAppendsTakeTwoHeadsPerThread) {
  const auto plan = [](const Geometry& g) {
    const CacheAppend p = append_of(g);
    const auto scales = [&](int number) {
      return contiguous(address(number), DType::Float32, {g.blocks, g.block_size, g.heads});
    };
    return plan_append_dynamic(
        lower(CacheAppendDynamic{p.key, p.value, p.key_cache, p.value_cache, scales(7), scales(8), p.slot_mapping}).front());
  };
  EXPECT_EQ(plan({8191, 8, 128}).heads_per_thread, 1);
  EXPECT_EQ(plan({8192, 8, 128}).heads_per_thread, 2);
  EXPECT_EQ(plan({8192, 8, 128}).threads_per_head, 8);
  EXPECT_EQ(plan({8192, 8, 128}).threads, 64);
  EXPECT_EQ(plan({16384, 8, 64}).heads_per_thread, 1);
  EXPECT_EQ(plan({8192, 7, 128}).heads_per_thread, 1);
  EXPECT_EQ(plan({8192, 8, 120}).heads_per_thread, 1);
  EXPECT_EQ(plan({8192, 8, 128, 64, 16, true, 8}).heads_per_thread, 1);
  EXPECT_TRUE(plan({8192, 8, 128, 64, 16, true, 8}).aligned);
}

TEST(PlanCache, HeadsThatNoWarpHoldsAreReadTwice) {
  const CachePlan plan = plan_dynamic_append(1032);
  EXPECT_EQ(plan.path, KernelPath::Scalar);
  EXPECT_EQ(plan.threads_per_head, 32);
}

TEST(PlanCache, NoTokensAreNoLaunch) {
  EXPECT_EQ(plan_append(lower(append_of({0, 8, 128})).front()).tokens, 0);
  EXPECT_EQ(plan_append_dynamic(lower(append_of({0, 8, 128})).front()).tokens, 0);
}

// The blocks of a gather come from a table of 32 bits, however many there are.
TEST(PlanCache, AGatherTakesVectorsFromCachesOfAnySize) {
  constexpr std::int64_t kSlots = std::int64_t{1} << 32;
  const CacheLayout layout = lower(append_of({16, 1, 8, kSlots / 16, 16})).front();
  EXPECT_EQ(plan_append(layout).path, KernelPath::Scalar);
  EXPECT_EQ(plan_gather(layout).path, KernelPath::Vectorized);
}

// Scales per channel of K, per head of V.
CacheAppend channels_append(const Geometry& g, std::int64_t misalignment = 0) {
  CacheAppend p = append_of(g);
  p.k_scale = channels_of(g, 9, misalignment);
  return p;
}

TEST(PlanCache, ChannelsAreVectorsOfScales) {
  const Geometry g{128, 8, 128};
  const CachePlan plan = plan_append(lower(channels_append(g)).front());
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_TRUE(plan.aligned);
  EXPECT_EQ(plan.vecs_per_head, 16);
  CacheAppend with_offset = append_of(g);
  with_offset.v_offset = channels_of(g, 9);
  EXPECT_EQ(plan_append(lower(with_offset).front()).path, KernelPath::PerColumn);
  EXPECT_EQ(plan_gather(lower(with_offset).front()).path, KernelPath::PerColumn);
}

TEST(PlanCache, ChannelsOfOddHeadsAreOneAlignedRow) {
  const Geometry g{16, 8, 20};
  CacheAppend p = channels_append(g);
  EXPECT_EQ(plan_append(lower(p).front()).path, KernelPath::Scalar) << "V has scales per head";
  p.v_scale = channels_of(g, 10);
  const CachePlan plan = plan_append(lower(p).front());
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_EQ(plan.vecs_per_head, 20);
}

TEST(PlanCache, ChannelsThatNoVectorReadsGoOneByOne) {
  const Geometry g{128, 8, 128};
  const auto path = [](const CacheAppend& p) { return plan_append(lower(p).front()).path; };
  EXPECT_EQ(path(channels_append(g, 8)), KernelPath::Scalar) << "an address";
  CacheAppend p = channels_append(g);
  p.k_scale.strides[0] = 130;
  EXPECT_EQ(path(p), KernelPath::Scalar) << "heads";
  p = channels_append(g);
  for (int d = 0; d < 2; ++d) p.k_scale.strides[d] *= 2;
  EXPECT_EQ(path(p), KernelPath::Scalar) << "elements";
  p = append_of(g), p.k_offset = channels_of(g, 9, 4);
  EXPECT_EQ(path(p), KernelPath::Scalar) << "an offset";
  p = append_of({128, 8, 128, 64, 16, true, 1}), p.k_offset = channels_of(g, 9);
  EXPECT_EQ(path(p), KernelPath::Scalar) << "the caches";
}

TEST(PlanCache, ManyTokensShareTheScalesOfChannels) {
  EXPECT_EQ(plan_append(lower(channels_append({511, 8, 128})).front()).tokens_per_thread, 1);
  EXPECT_EQ(plan_append(lower(channels_append({512, 8, 128})).front()).tokens_per_thread, 4);
  EXPECT_EQ(plan_append(lower(append_of({4095, 8, 128})).front()).tokens_per_thread, 1);
  EXPECT_EQ(plan_append(lower(append_of({4096, 8, 128})).front()).tokens_per_thread, 2);
  EXPECT_EQ(plan_append(lower(append_of({4096, 8, 128})).front()).threads, 64);
  EXPECT_EQ(plan_gather(lower(channels_append({2047, 8, 128})).front()).tokens_per_thread, 1);
  EXPECT_EQ(plan_gather(lower(channels_append({2048, 8, 128})).front()).tokens_per_thread, 2);
}

TEST(PlanCache, DynamicAppendsWithOffsetsHoldAHeadToo) {
  const Geometry g{128, 8, 128};
  const CacheAppend p = append_of(g);
  const TensorView k_scales = contiguous(address(7), DType::Float32, {64, 16, 8}),
                   v_scales = contiguous(address(8), DType::Float32, {64, 16, 8});
  CacheAppendDynamic dynamic{p.key, p.value, p.key_cache, p.value_cache, k_scales, v_scales, p.slot_mapping};
  dynamic.v_offset = channels_of(g, 9);
  const CachePlan plan = plan_append_dynamic(lower(dynamic).front());
  EXPECT_EQ(plan.path, KernelPath::PerColumn);
  EXPECT_EQ(plan.threads_per_head, 8);
  EXPECT_EQ(plan.vecs_per_thread, 2);
  dynamic.v_offset = channels_of(g, 9, 4);
  EXPECT_EQ(plan_append_dynamic(lower(dynamic).front()).path, KernelPath::Scalar);
}

TEST(PlanCache, LargeGathersTakeSeveralVectorsPerThread) {
  const auto plan = [](const Geometry& g) { return plan_gather(lower(append_of(g)).front()); };
  EXPECT_EQ(plan({1023, 8, 128}).vecs_per_thread, 1);
  EXPECT_EQ(plan({1023, 8, 128}).threads, 256);
  EXPECT_EQ(plan({1024, 8, 128}).vecs_per_thread, 4);
  EXPECT_EQ(plan({1024, 8, 128}).threads, 128);
  EXPECT_EQ(plan({8191, 8, 128}).vecs_per_thread, 4);
  EXPECT_EQ(plan({8192, 8, 128}).vecs_per_thread, 2);
  EXPECT_EQ(plan({8192, 8, 128}).threads, 128);
  EXPECT_EQ(plan({8192, 1, 128}).vecs_per_thread, 4) << "fourths of a head";
  EXPECT_EQ(plan({65536, 1, 128}).vecs_per_thread, 2) << "halves of a head";
  EXPECT_EQ(plan({8192, 2, 72}).vecs_per_thread, 2) << "neither heads nor vectors can be divided by 4";
  EXPECT_EQ(plan({8192, 5, 120}).vecs_per_thread, 1) << "nor by 2";
  EXPECT_EQ(plan({8192, 5, 120}).threads, 256);
  EXPECT_EQ(plan({8192, 8, 20}).vecs_per_thread, 1) << "not aligned";
  EXPECT_EQ(plan_gather(lower(channels_append({8192, 8, 128})).front()).vecs_per_thread, 1);
}

}  // namespace
}  // namespace fp8kv::core
