// Memory of large outputs. A block goes back to the pool when its tensor dies, and is handed out again as it is. The
// system would zero fresh pages at every call: forward + backward 436 ms, with fresh pages 669 (one thread, busy avx2
// machine, fp32, N=32768, D=512).
#pragma once

#include <cstdint>

namespace depthlstm {

// Outputs of at least this size come from the pool: glibc hands them out as fresh pages.
constexpr int64_t pool_least_bytes = int64_t(4) << 20;

struct PoolStatistics {
    int64_t limit_bytes;  // of idle blocks
    int64_t idle_bytes, idle_blocks;
    int64_t live_bytes, live_blocks;
    int64_t reused, fresh;  // blocks handed out again, and blocks taken from the system
    int64_t returned;       // blocks given back to the system
};

// A block of at least `bytes` bytes, aligned to a huge page, and its size in `capacity`; null where memory is out or
// the limit is 0. What it holds is undefined. Every function may be called from any thread.
void* pool_take(int64_t bytes, int64_t* capacity);
void pool_give_back(void* block, int64_t capacity);

// Gives all idle blocks back to the system.
void pool_empty();
// Idle blocks above the limit are given back, the oldest first. 0: large outputs are torch's again.
void pool_set_limit(int64_t bytes);
PoolStatistics pool_statistics();
// For tests: blocks are filled with 0xff, NaN in every floating-point type, before they are handed out.
void pool_poison(bool on);

}  // namespace depthlstm
