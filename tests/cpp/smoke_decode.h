// What the programs of the decode engine's kernels share: arrays of floats, comparison.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

#include "decode/cpu.h"
#include "guarded.h"

namespace depthlstm::smoke_decoding {

inline int failures = 0;
inline int checks = 0;

// Floats of an array that ends, or begins, at the forbidden page. They are NaN before they are written.
struct Floats : Guarded {
    int64_t count;
    explicit Floats(int64_t count) : Guarded(count * 4, 4), count(count) {}
    float* at() const { return reinterpret_cast<float*>(data); }
    void randomise() {
        for (int64_t i = 0; i < count; ++i) at()[i] = float(random_value());
    }
};

inline void near(const char* name, int64_t i, double found, double wanted, double scale) {
    ++checks;
    if (std::fabs(found - wanted) <= 1e-5 * (1 + scale)) return;
    if (++failures < 20) std::printf("wrong %s[%lld]: found %.9g, wanted %.9g\n", name, (long long)i, found, wanted);
}

inline void same(const char* name, int64_t found, int64_t wanted) {
    ++checks;
    if (found == wanted) return;
    if (++failures < 20) std::printf("wrong %s: found %lld, wanted %lld\n", name, (long long)found, (long long)wanted);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The products' cases. `number` counts the cases of all programs.
void smoke_decode_products(const DecodeKernels& kernels, int64_t& number);

}  // namespace depthlstm::smoke_decoding
