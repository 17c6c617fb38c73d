// Execution of a grid: blocks one after the other, the threads of a block in turns.
#pragma once
#include <string>

#include "simulator.h"

namespace ptx {

struct LaunchSize {
    Dimensions grid, block;
    size_t dynamic_shared;
    Dimensions first_block = {0, 0, 0};  // added to the number of each block; earlier blocks do not run
};
// Returns the error, or "" for none. The seed decides the order of blocks and threads.
std::string run_grid(const Kernel& kernel, const LaunchSize& size, const u8* const* parameters, u64 seed);

// Blocks of a batch have their own threads and shared memory. To ThreadSanitizer nothing orders them.
constexpr u32 largest_batch = 64;

// Prepares the shared memory of a starting block: NaN, with accesses between its arrays forbidden.
void prepare_shared_memory(const Kernel& kernel, size_t dynamic_shared, u32 place_in_batch);

// Memory accesses of cp.async, compiled with the sanitizer.
void begin_copy(u8* target, const u8* source, u32 size, u32 source_size);
void finish_copy(u8* target, const u8* source, u32 size, u32 source_size);

}  // namespace ptx
