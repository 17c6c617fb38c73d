// The simulator's services for translated kernels: identity, barriers, exchanges within a warp, and fault reports.
#pragma once
#include <cstddef>

#include "types.h"

namespace ptx {

struct Dimensions {
    u32 x, y, z;
    u64 count() const { return u64(x) * y * z; }
};

// A line of the kernel's source.
struct Location {
    const char* file;
    int line;
};

struct ThreadContext {
    Dimensions thread, block, block_size, grid_size;
    u32 lane, warp, dynamic_shared_bytes;
};
extern ThreadContext* current;  // of the running CUDA thread

// Ends the launch with an error that names the running thread and the line.
[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(const Location& at, const char* format, ...);

constexpr int all_threads = 0;
enum class Reduction { any, all, count };
// bar.sync, bar.red and bar.arrive on one of 16 barriers, for `threads` of the block.
void barrier(u32 identifier, u32 threads, const Location& at);
u32 barrier_reduce(u32 identifier, u32 threads, Reduction reduction, bool value, const Location& at);
void barrier_arrive(u32 identifier, u32 threads, const Location& at);
void fence();

enum class WarpOperation {
    synchronize,
    shuffle_up,
    shuffle_down,
    shuffle_butterfly,
    shuffle_index,
    vote,
    reduce,
    load_matrix,
    store_matrix
};
// Waits for all lanes of `mask`, and returns their values; only synchronize orders memory.
void exchange(u32 mask, WarpOperation operation, u32 value, const Location& at, u32 (&values)[32]);

void copy_async(u64 shared, u64 global, u32 size, u32 source_size, const Location& at);
void commit_copies();
void wait_for_copies(u32 groups_left);

constexpr size_t red_zone = 32;  // bytes between the arrays in shared memory
u64 shared_memory();             // address of the first byte, below 2^32

// Registered by each translated kernel.
struct SharedArray {
    u32 offset, size;
};
struct Kernel {
    const char* name;
    void (*function)(const u8* const* parameters);
    const u32* parameter_sizes;
    u32 parameter_count;
    const SharedArray* shared_arrays;
    u32 shared_array_count;
    u32 shared_size;  // with red zones; dynamic shared memory starts there
    u32 shared_used;  // without red zones
    u32 largest_block;
    bool exact_block;  // .reqntid: a block has largest_block threads
};
void register_kernel(const Kernel* kernel);

}  // namespace ptx
