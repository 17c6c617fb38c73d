// The simulator's C functions, the known kernels, and the shared memory of a block.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "fiber.h"
#include "launch.h"

namespace ptx {
namespace {

constexpr size_t shared_capacity = 512 << 10;  // with red zones
constexpr size_t parameter_alignment = 128;

std::string last_error;
u64 order_seed = 0;
u32 first_block = 0;
std::string launched;

std::map<std::string, std::vector<const Kernel*>>& kernels() {
    static std::map<std::string, std::vector<const Kernel*>> known;
    return known;
}

u8* shared_of_block;

u8* shared_arena() {
    // kernels keep addresses of shared memory in 32 bits
    static u8* const arena = static_cast<u8*>(map_memory(largest_batch * shared_capacity, MAP_32BIT));
    return arena;
}

// The reason why CUDA would refuse the launch, or nullptr.
const char* refused(const Kernel& kernel, const LaunchSize& size) {
    const u64 threads = size.block.count();
    if (threads == 0 || threads > 1024 || size.block.z > 64) return "a block has 1 to 1024 threads, 64 in z";
    if (size.grid.count() == 0 || size.grid.x > 0x7fffffff || size.grid.y > 65535 || size.grid.z > 65535)
        return "the grid's size";
    if (kernel.largest_block && threads > kernel.largest_block) return "more threads than __launch_bounds__";
    if (kernel.exact_block && threads != kernel.largest_block) return "not the threads that the kernel requires";
    if (kernel.shared_used + size.dynamic_shared > largest_shared_memory) return "too much shared memory";
    if (kernel.shared_size + size.dynamic_shared + red_zone > shared_capacity)
        return "more arrays in shared memory than fit with red zones";
    return nullptr;
}

}  // namespace

void register_kernel(const Kernel* kernel) { kernels()[kernel->name].push_back(kernel); }
u64 shared_memory() { return reinterpret_cast<u64>(shared_of_block); }

const Kernel* find_kernel(const std::string& name) {
    const auto found = kernels().find(name);
    return found == kernels().end() || found->second.size() > 1 ? nullptr : found->second[0];
}

void prepare_shared_memory(const Kernel& kernel, size_t dynamic_shared, u32 place_in_batch) {
    u8* memory = shared_of_block = shared_arena() + place_in_batch * shared_capacity;
    NotChecked scope;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, shared_capacity);
    memset(memory, 0xff, kernel.shared_size + dynamic_shared + red_zone);
    if (__asan_poison_memory_region) {
        __asan_poison_memory_region(memory, shared_capacity);
        for (u32 i = 0; i < kernel.shared_array_count; i++) {
            __asan_unpoison_memory_region(memory + kernel.shared_arrays[i].offset, kernel.shared_arrays[i].size);
        }
        __asan_unpoison_memory_region(memory + kernel.shared_size, dynamic_shared);
    }
}

int launch(const std::string& name, LaunchSize size, void** arguments) {
    const Kernel* kernel = find_kernel(name);
    if (!kernel) {
        last_error =
            (kernels().count(name) ? "several translation units define the kernel " : "there is no kernel ") + name;
        return invalid_device_function;
    }
    if (const char* reason = refused(*kernel, size)) {
        last_error = name + ": bad launch: " + reason;
        return invalid_configuration;
    }
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    std::vector<std::unique_ptr<void, decltype(&free)>> copies;  // each in memory of its exact size
    std::vector<const u8*> parameters;
    for (u32 i = 0; i < kernel->parameter_count; i++) {
        void* memory = nullptr;
        if (posix_memalign(&memory, parameter_alignment, kernel->parameter_sizes[i])) abort();
        memcpy(memory, arguments[i], kernel->parameter_sizes[i]);
        copies.emplace_back(memory, free);
        parameters.push_back(static_cast<u8*>(memory));
    }
    launched += name + "\n";
    (size.grid.z > 1 ? size.first_block.z : size.grid.y > 1 ? size.first_block.y : size.first_block.x) = first_block;
    const std::string error = run_grid(*kernel, size, parameters.data(), order_seed);
    if (error.empty()) return success;
    last_error = error;
    return launch_failure;
}

const std::string& error_of_last_launch() { return last_error; }

}  // namespace ptx

extern "C" {
[[gnu::visibility("default")]] int ptx_launch(const char* name, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                              unsigned block_x, unsigned block_y, unsigned block_z,
                                              size_t dynamic_shared, void** arguments) {
    return ptx::launch(name, {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_shared}, arguments);
}
// The error of the last failed launch.
[[gnu::visibility("default")]] const char* ptx_error() { return ptx::last_error.c_str(); }
// Names of all kernels, a line each.
[[gnu::visibility("default")]] const char* ptx_kernels() {
    static std::string names;
    names.clear();
    for (const auto& entry : ptx::kernels()) names += entry.first + "\n";
    return names.c_str();
}
[[gnu::visibility("default")]] void ptx_seed(uint64_t seed) { ptx::order_seed = seed; }
// Numbers blocks from `first` on, along the last axis that has several. A test reaches the end of a long grid this way.
[[gnu::visibility("default")]] void ptx_first_block(unsigned first) { ptx::first_block = first; }
// Names of the kernels that were launched since the last call, a line each.
[[gnu::visibility("default")]] const char* ptx_launched() {
    static std::string names;
    names = std::exchange(ptx::launched, {});
    return names.c_str();
}
}
