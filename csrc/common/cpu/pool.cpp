#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace depthlstm {
namespace {

constexpr int64_t huge_page = int64_t(2) << 20;
// Blocks that begin alike in their pages share the sets and the way predictor of an L1: backward of Keel's norm_step in
// bf16 took 19.0 ms with all blocks at the beginning of a huge page, 18.4 ms with steps of 4096 bytes, 8.9 ms so
// (8,192 rows of 512, Zen 3). 16 steps go once through the sets of an L1 (4 KiB) and of an L2 (64 KiB).
constexpr int64_t places = 16, step = 4096 + 256;
constexpr int64_t granule = 65536;  // of a block's capacity; it holds all steps
static_assert((places - 1) * step <= granule);
// A larger idle block serves where it wastes at most this share of itself.
constexpr int64_t waste_divisor = 4;

int64_t read_number(const char* path) {
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) return -1;
    long long value = -1;
    if (std::fscanf(file, "%lld", &value) != 1) value = -1;
    std::fclose(file);
    return value;
}

// An eighth of the memory that the machine or the control group has: several processes may share it.
int64_t default_limit() {
    int64_t memory = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
        const int64_t group = read_number(path);
        if (group > 0 && group < memory) memory = group;
    }
    return memory / 8;
}

int64_t first_limit() {
    const char* text = std::getenv("DEPTHLSTM_POOL_BYTES");
    if (text == nullptr || *text == '\0') return default_limit();
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text, &end, 10);
    // what is no number is an error of depthlstm_fast/memory.py, which reads the variable, too
    return *end != '\0' || errno != 0 || value < 0 ? default_limit() : value;
}

// The data begin less than a granule behind the first of their pages, which hold a granule more than the capacity.
struct Block {
    void* data;
    int64_t capacity;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> idle;  // the oldest first
    PoolStatistics counts{};
    bool poisons = false;

    Pool() { counts.limit_bytes = first_limit(); }

    void unmap(const Block& block) {
        const uintptr_t pages = reinterpret_cast<uintptr_t>(block.data) / huge_page * huge_page;
        munmap(reinterpret_cast<void*>(pages), std::size_t(block.capacity + granule));
        ++counts.returned;
    }

    void shrink_to(int64_t bytes) {
        std::size_t count = 0;
        for (; counts.idle_bytes > bytes && count < idle.size(); ++count) {
            counts.idle_bytes -= idle[count].capacity;
            unmap(idle[count]);
        }
        idle.erase(idle.begin(), idle.begin() + std::ptrdiff_t(count));
        counts.idle_blocks = int64_t(idle.size());
    }

    // The smallest idle block that fits; of equal ones the youngest, which the caches may still hold.
    Block find(int64_t need) {
        std::size_t best = idle.size();
        for (std::size_t i = 0; i < idle.size(); ++i) {
            const int64_t capacity = idle[i].capacity;
            if (capacity < need || capacity - need > capacity / waste_divisor) continue;
            if (best == idle.size() || capacity <= idle[best].capacity) best = i;
        }
        if (best == idle.size()) return {nullptr, 0};
        const Block found = idle[best];
        idle.erase(idle.begin() + std::ptrdiff_t(best));
        counts.idle_bytes -= found.capacity;
        counts.idle_blocks = int64_t(idle.size());
        return found;
    }

    void* map(int64_t capacity) const {
        const int64_t bytes = capacity + granule;
        const std::size_t size = std::size_t(bytes + huge_page);
        void* whole = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (whole == MAP_FAILED) return nullptr;
        const uintptr_t begin = reinterpret_cast<uintptr_t>(whole);
        const uintptr_t aligned = (begin + huge_page - 1) / huge_page * huge_page;
        if (aligned > begin) munmap(whole, aligned - begin);
        const uintptr_t end = begin + size, wanted = aligned + uintptr_t(bytes);
        if (end > wanted) munmap(reinterpret_cast<void*>(wanted), end - wanted);
        char* data = reinterpret_cast<char*>(aligned);
        // advice only: where the kernel knows no huge pages nothing changes
        (void)madvise(data, std::size_t(bytes), MADV_HUGEPAGE);
        return data + counts.fresh % places * step;
    }
};

// Never destroyed: tensors outlive every order of destruction at exit.
Pool& pool() {
    static Pool* const only = [] {
        Pool* made = new Pool;
        // a child of fork must not inherit a mutex that another thread holds
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
        return made;
    }();
    return *only;
}

}  // namespace

void* pool_take(int64_t bytes, int64_t* capacity) {
    Pool& own = pool();
    const int64_t need = (bytes + granule - 1) / granule * granule;
    Block block{nullptr, 0};
    bool poisons = false;
    {
        const std::lock_guard lock(own.mutex);
        if (own.counts.limit_bytes == 0) return nullptr;
        block = own.find(need);
        if (block.data != nullptr) {
            ++own.counts.reused;
        } else {
            block = {own.map(need), need};
            if (block.data == nullptr && !own.idle.empty()) {
                own.shrink_to(0);
                block.data = own.map(need);
            }
            if (block.data == nullptr) return nullptr;
            ++own.counts.fresh;
        }
        own.counts.live_bytes += block.capacity;
        ++own.counts.live_blocks;
        poisons = own.poisons;
    }
    if (poisons) std::memset(block.data, 0xff, std::size_t(block.capacity));
    *capacity = block.capacity;
    return block.data;
}

void pool_give_back(void* data, int64_t capacity) {
    Pool& own = pool();
    const std::lock_guard lock(own.mutex);
    own.counts.live_bytes -= capacity;
    --own.counts.live_blocks;
    if (capacity > own.counts.limit_bytes) return own.unmap({data, capacity});
    own.shrink_to(own.counts.limit_bytes - capacity);
    own.idle.push_back({data, capacity});
    own.counts.idle_bytes += capacity;
    own.counts.idle_blocks = int64_t(own.idle.size());
}

void pool_empty() {
    Pool& own = pool();
    const std::lock_guard lock(own.mutex);
    own.shrink_to(0);
}

void pool_set_limit(int64_t bytes) {
    Pool& own = pool();
    const std::lock_guard lock(own.mutex);
    own.counts.limit_bytes = bytes;
    own.shrink_to(bytes);
}

PoolStatistics pool_statistics() {
    Pool& own = pool();
    const std::lock_guard lock(own.mutex);
    return own.counts;
}

void pool_poison(bool on) {
    Pool& own = pool();
    const std::lock_guard lock(own.mutex);
    own.poisons = on;
}

}  // namespace depthlstm

#else  // the kernels are built on Linux only

namespace depthlstm {
void* pool_take(int64_t, int64_t*) { return nullptr; }
void pool_give_back(void*, int64_t) {}
void pool_empty() {}
void pool_set_limit(int64_t) {}
PoolStatistics pool_statistics() { return {}; }
void pool_poison(bool) {}
}  // namespace depthlstm

#endif
