// Plans of the attention step.
#include <gtest/gtest.h>

#include <vector>

#include "plan_support.h"

namespace fp8kv::core {
namespace {

using namespace testing_support;

// Q of 4 * heads, K and V in bfloat16, with RoPE.
RopeAppend rope_of(std::int64_t tokens, std::int64_t heads, std::int64_t head_size, std::int64_t rotary_dim) {
  const CacheAppend p = append_of({tokens, heads, head_size});
  return {.query = contiguous(address(7), DType::BFloat16, {tokens, 4 * heads, head_size}),
          .key = p.key,
          .value = p.value,
          .query_out = contiguous(address(8), DType::E4M3, {tokens, 4 * heads, head_size}),
          .key_cache = p.key_cache,
          .value_cache = p.value_cache,
          .slot_mapping = p.slot_mapping,
          .q_scale = p.k_scale,
          .k_scale = p.k_scale,
          .v_scale = p.v_scale,
          .positions = contiguous(address(9), DType::Int64, {tokens}),
          .cos_sin_cache = contiguous(address(10), DType::Float32, {100, rotary_dim})};
}

TEST(PlanRopeAppend, HeadsOfWholeVectorsAreAVectorPerThread) {
  const RopeAppendPlan plan = plan_rope_append(lower(rope_of(16, 8, 128, 128)));
  EXPECT_EQ(plan.path, KernelPath::Vectorized);
  EXPECT_EQ(plan.threads_per_head, 16);
  EXPECT_EQ(plan_rope_append(lower(rope_of(16, 8, 80, 32))).threads_per_head, 10);
}

TEST(PlanRopeAppend, WithANormTheThreadsOfAHeadAreAPowerOfTwo) {
  RopeAppend p = rope_of(16, 8, 80, 32);
  p.k_norm_weight = contiguous(address(11), DType::BFloat16, {80});
  EXPECT_EQ(plan_rope_append(lower(p)).threads_per_head, 16);
  p = rope_of(16, 8, 264, 264);
  EXPECT_EQ(plan_rope_append(lower(p)).path, KernelPath::Vectorized);
  p.k_norm_weight = contiguous(address(11), DType::BFloat16, {264});
  EXPECT_EQ(plan_rope_append(lower(p)).path, KernelPath::Scalar) << "more than a warp holds";
}

// Of a thread: vectors of a head, heads of Q, heads of K and of V.
using Share = std::vector<int>;

Share share_of(const RopeAppend& p) {
  const RopeAppendPlan plan = plan_rope_append(lower(p));
  return {plan.vecs_per_thread, plan.query_heads_per_thread, plan.kv_heads_per_thread};
}

RopeAppend without_rope(RopeAppend p) {
  p.positions.reset(), p.cos_sin_cache.reset();
  return p;
}

RopeAppend with_norm(RopeAppend p, std::int64_t head_size) {
  p.q_norm_weight = contiguous(address(11), DType::BFloat16, {head_size});
  return p;
}

TEST(PlanRopeAppend, ManyTokensShareWhatIsReadForAHead) {
  EXPECT_EQ(share_of(rope_of(298, 8, 128, 128)), (Share{1, 1, 1}));
  EXPECT_EQ(share_of(rope_of(299, 8, 128, 128)), (Share{2, 2, 2}));
  EXPECT_EQ(share_of(rope_of(683, 8, 128, 128)), (Share{2, 4, 4}));
  EXPECT_EQ(share_of(rope_of(16384, 8, 128, 128)), (Share{2, 4, 4}));
  EXPECT_EQ(share_of(with_norm(rope_of(213, 8, 128, 128), 128)), (Share{1, 1, 1}));
  EXPECT_EQ(share_of(with_norm(rope_of(214, 8, 128, 128), 128)), (Share{2, 2, 2}));
  EXPECT_EQ(share_of(with_norm(rope_of(683, 8, 128, 128), 128)), (Share{2, 4, 4}));
  EXPECT_EQ(share_of(with_norm(rope_of(16384, 8, 128, 128), 128)), (Share{2, 8, 8}));
}

TEST(PlanRopeAppend, NothingIsSharedWithoutRope) {
  EXPECT_EQ(share_of(without_rope(rope_of(42, 8, 128, 128))), (Share{1, 1, 1}));
  EXPECT_EQ(share_of(without_rope(rope_of(43, 8, 128, 128))), (Share{2, 1, 1}));
  EXPECT_EQ(share_of(without_rope(rope_of(16384, 8, 128, 128))), (Share{2, 1, 1}));
  EXPECT_EQ(share_of(without_rope(rope_of(16384, 8, 120, 120))), (Share{1, 1, 1})) << "15 vectors";
}

TEST(PlanRopeAppend, HeadsAreSharedEvenly) {
  EXPECT_EQ(share_of(rope_of(1400, 3, 64, 64)), (Share{1, 1, 1}));
  EXPECT_EQ(share_of(with_norm(rope_of(1400, 3, 64, 64), 64)), (Share{2, 2, 3}));
  EXPECT_EQ(share_of(rope_of(16384, 3, 64, 64)), (Share{2, 4, 3}));
  EXPECT_EQ(share_of(rope_of(4096, 5, 64, 64)), (Share{2, 4, 5}));
  EXPECT_EQ(share_of(rope_of(4096, 7, 64, 64)), (Share{2, 4, 7}));
  EXPECT_EQ(share_of(rope_of(16384, 1, 64, 64)), (Share{2, 4, 1}));
  EXPECT_EQ(share_of(rope_of(4096, 11, 64, 64)), (Share{1, 1, 1})) << "no divisor up to 8";
  EXPECT_EQ(share_of(rope_of(4096, 65, 64, 64)), (Share{1, 1, 1})) << "more scales than shared memory holds";
  RopeAppend p = rope_of(1 << 16, 1, 64, 64);
  p.query.sizes[1] = p.query_out.sizes[1] = 1;
  EXPECT_EQ(share_of(p), (Share{1, 1, 1})) << "one head each";
}

TEST(PlanRopeAppend, TwoVectorsOfAHeadHaveHalfTheThreads) {
  RopeAppendPlan plan = plan_rope_append(lower(rope_of(4096, 8, 96, 96)));
  EXPECT_EQ(plan.threads, kManyHeadsThreads);
  EXPECT_EQ(plan.threads_per_head, 6);
  plan = plan_rope_append(lower(with_norm(rope_of(4096, 8, 96, 96), 96)));
  EXPECT_EQ(plan.threads_per_head, 8);
  EXPECT_EQ(share_of(rope_of(4096, 8, 120, 112)), (Share{1, 1, 1})) << "15 vectors";
  EXPECT_EQ(share_of(rope_of(4096, 8, 128, 120)), (Share{1, 1, 1}));
  RopeAppend p = rope_of(4096, 8, 128, 128);
  p.cos_sin_cache->dtype = DType::BFloat16;
  EXPECT_EQ(share_of(p), (Share{2, 4, 4}));
  p.cos_sin_cache->strides[0] = 132;
  EXPECT_EQ(share_of(p), (Share{1, 1, 1})) << "rows of the table that are not aligned to 16 bytes";
}

TEST(PlanRopeAppend, ATokenHasThreadsForTheHeadsOfK) {
  const auto threads = [](const RopeAppend& p) { return plan_rope_append(lower(p)).threads; };
  EXPECT_EQ(threads(rope_of(16, 8, 128, 128)), 128);
  EXPECT_EQ(threads(rope_of(16, 32, 128, 128)), 128) << "in several blocks";
  EXPECT_EQ(threads(rope_of(16, 4, 128, 128)), 64);
  EXPECT_EQ(threads(rope_of(16, 6, 128, 128)), 96);
  EXPECT_EQ(threads(rope_of(16, 3, 64, 64)), 24);
  EXPECT_EQ(threads(rope_of(16, 1, 64, 64)), 8);
  EXPECT_EQ(threads(with_norm(rope_of(16, 3, 64, 64), 64)), 32) << "whole warps";
  EXPECT_EQ(threads(with_norm(rope_of(16, 3, 80, 32), 80)), 64) << "16 threads for 10 vectors";
  EXPECT_EQ(threads(without_rope(rope_of(64, 8, 128, 128))), 64) << "two vectors per thread";
  RopeAppend p = rope_of(16, 1, 64, 64);
  p.query = contiguous(address(7), DType::BFloat16, {16, 129, 64});
  p.query_out = contiguous(address(8), DType::E4M3, {16, 129, 64});
  EXPECT_EQ(threads(p), 24) << "64 blocks for Q would have 2.02 heads each";
}

TEST(PlanRopeAppend, ChannelsAreSharedByTokens) {
  RopeAppend p = rope_of(4096, 8, 128, 128);
  p.k_offset = channels_of({4096, 8, 128}, 12);
  EXPECT_EQ(share_of(p), (Share{2, 4, 4}));
  EXPECT_EQ(share_of(without_rope(p)), (Share{2, 2, 4}));
  EXPECT_EQ(share_of(with_norm(p, 128)), (Share{2, 4, 4}));
  p.k_offset = channels_of({4096, 8, 128}, 12, 4);
  EXPECT_EQ(plan_rope_append(lower(p)).path, KernelPath::Scalar);
  p = rope_of(682, 8, 128, 128);
  p.k_offset = channels_of({682, 8, 128}, 12);
  EXPECT_EQ(share_of(p), (Share{1, 1, 1})) << "few tokens";
  p = with_norm(p, 128);
  EXPECT_EQ(share_of(p), (Share{1, 1, 1}));
  p = rope_of(4096, 32, 128, 128);
  p.k_offset = channels_of({4096, 32, 128}, 12);
  EXPECT_EQ(share_of(p), (Share{1, 1, 1})) << "more than shared memory should hold";
}

TEST(PlanRopeAppend, WhatFewCallsHaveTakesOneHeadPerThread) {
  RopeAppend p = rope_of(4096, 8, 120, 120);
  p.positions = contiguous(address(9), DType::Int64, {3, 4096});
  p.mrope_section = {20, 20, 20};
  EXPECT_EQ(share_of(p), (Share{1, 1, 1}));
  p = with_norm(rope_of(4096, 8, 120, 120), 120);
  p.norm_after_rope = true;
  EXPECT_EQ(share_of(p), (Share{1, 1, 1}));
}

TEST(PlanRopeAppend, WhatDoesNotFitIsAWarpPerHead) {
  const auto path = [](const auto& change) {
    RopeAppend p = rope_of(16, 8, 128, 128);
    change(p);
    return plan_rope_append(lower(p)).path;
  };
  EXPECT_EQ(path([](auto& p) { p.cos_sin_cache->sizes[1] = 12; }), KernelPath::Scalar) << "half a vector";
  EXPECT_EQ(path([](auto& p) { p.query.data = static_cast<char*>(p.query.data) + 2; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.cos_sin_cache->strides[0] = 130; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query_out.strides[0] += 4; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query_out.dtype = DType::Float32, p.query_out.strides[0] *= 2; }), KernelPath::Scalar);
  EXPECT_EQ(path([](auto& p) { p.query.strides[0] += 8 * 128; }), KernelPath::Vectorized) << "a slice";
  EXPECT_EQ(path([](auto& p) { p.cos_sin_cache->sizes[0] = kMaxChunk; }), KernelPath::Scalar)
      << "positions of more than 31 bits";
  EXPECT_EQ(plan_rope_append(lower(rope_of(1, 1 << 13, 128, 128))).path, KernelPath::Scalar) << "blocks of a token";
}

TEST(PlanRopeAppend, ManyTokensAreLaunchedInChunks) {
  const std::int64_t tokens = 1 << 24;
  const RopeAppendPlan plan = plan_rope_append(lower(rope_of(tokens, 8, 128, 128)));
  EXPECT_LT(plan.tokens, tokens);
  EXPECT_LT(plan.tokens * 16 * (32 + 8), kMaxChunk);
}

TEST(PlanRopeAppend, NothingToDoIsNotDividedByZero) {
  EXPECT_EQ(plan_rope_append(lower(rope_of(0, 8, 128, 128))).tokens, 0);
  EXPECT_EQ(plan_rope_append(lower(rope_of(16, 0, 128, 128))).tokens, 16);
}

}  // namespace
}  // namespace fp8kv::core
