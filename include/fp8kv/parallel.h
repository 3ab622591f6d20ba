// Thread-pool callback of the CPU backend: how callers distribute its work over their threads.
#pragma once

#include <cstdint>
#include <functional>

namespace fp8kv::cpu {

// Runs body(begin, end) over ranges that cover [0, count), in any order and on any threads; ranges below `grain` are not worth
// a thread.
using ParallelFor =
    std::function<void(std::int64_t count, std::int64_t grain, const std::function<void(std::int64_t, std::int64_t)>& body)>;

}  // namespace fp8kv::cpu
