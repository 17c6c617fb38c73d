// Memory against a page that may not be touched, and random numbers, for the programs that run the kernels alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

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

class Guarded {
public:
    Guarded(int64_t bytes, int64_t alignment) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t inside = (size_t(bytes) + page - 1) / page * page;
        total_ = inside + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_, page, PROT_NONE) != 0 ||
            mprotect(base_ + page + inside, page, PROT_NONE) != 0)
            std::abort();
        const size_t slack = at_the_end ? (inside - size_t(bytes)) / size_t(alignment) * size_t(alignment) : 0;
        data = base_ + page + slack;
        std::memset(base_ + page, 0xff, inside);  // NaN in every type
    }
    ~Guarded() { munmap(base_, total_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    char* data;

private:
    char* base_;
    size_t total_;
};
