// Memory against a page that may not be touched, and random numbers, for the programs that run the kernels alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

inline uint64_t random_state = 1;

// Roughly normal, from a 64-bit linear congruential generator.
inline double random_value() {
    double sum = 0;
    for (int i = 0; i < 4; ++i) {
        random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
        sum += double(random_state >> 11) / double(1ULL << 53) - 0.5;
    }
    return 1.7 * sum;
}

// Memory between two pages that may not be touched. It ends where the second begins, or starts where the first ends. An
// access to one element too many crashes at the very instruction, in every instruction set and at full speed.
inline bool at_the_end = true;

// Whether freed memory serves again, by its size. Else it is given back, and an access to it crashes. An emulated
// machine spends more time with the kernel's part in that than with all else.
inline bool memory_serves_again = false;
inline std::map<size_t, std::vector<char*>> free_memory;

class Guarded {
public:
    Guarded(int64_t bytes, int64_t alignment) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t inside = (size_t(bytes) + page - 1) / page * page;
        total_ = inside + 2 * page;
        std::vector<char*>& free = free_memory[total_];
        if (!free.empty()) {
            base_ = free.back();
            free.pop_back();
        } else {
            base_ =
                static_cast<char*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (base_ == MAP_FAILED || mprotect(base_, page, PROT_NONE) != 0 ||
                mprotect(base_ + page + inside, page, PROT_NONE) != 0)
                std::abort();
        }
        const size_t slack = at_the_end ? (inside - size_t(bytes)) / size_t(alignment) * size_t(alignment) : 0;
        data = base_ + page + slack;
        std::memset(base_ + page, 0xff, inside);  // NaN in every type
    }
    ~Guarded() {
        if (memory_serves_again) {
            free_memory[total_].push_back(base_);
        } else {
            munmap(base_, total_);
        }
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    char* data;

private:
    char* base_;
    size_t total_;
};
