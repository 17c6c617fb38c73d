// Kernels of the decode engine. This file is compiled once for each instruction set.
#include "cpu_attend.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

V maximum_of(const float* values, int64_t count, bool& is_number) {
    V most(-infinity);
    for_blocks<W>(count, [&](auto part, int64_t block) __attribute__((always_inline)) {
        V v = part.load(values + block * W);
        if constexpr (std::is_same_v<decltype(part), Partial>) {
            v = xsimd::select(first_lanes<float>(part.count), v, V(-infinity));
        }
        is_number = is_number && xsimd::all(v == v);
        most = xsimd::max(v, most);
    });
    return most;
}

int64_t largest(const float* values, int64_t count) {
    bool is_number = true;
    const float most = xsimd::reduce_max(maximum_of(values, count, is_number));
    if (!is_number) return -1;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        if (xsimd::any(V::load_unaligned(values + i) == V(most))) break;
    }
    for (; i < count; ++i) {
        if (values[i] == most) return i;
    }
    return -1;
}

float log_sum(const float* values, int64_t count, float* maximum) {
    bool is_number = true;
    *maximum = xsimd::reduce_max(maximum_of(values, count, is_number));
    V sum(0.0f);
    const V most(*maximum);
    for_blocks<W>(count, [&](auto part, int64_t block) __attribute__((always_inline)) {
        V e = exp_of(part.load(values + block * W) - most);
        if constexpr (std::is_same_v<decltype(part), Partial>) {
            e = xsimd::select(first_lanes<float>(part.count), e, V(0.0f));
        }
        sum += e;
    });
    // the bounds of exp2 may hide what inf - inf is
    if (!is_number || *maximum == infinity || *maximum == -infinity) return __builtin_nanf("");
    return float(std::log(double(xsimd::reduce_add(sum))));
}

// Few values pass the least one kept so far, so that a comparison of a whole vector throws nearly all of them away.
int64_t top(const float* values, int64_t count, int64_t wanted, float* found, int32_t* indices) {
    int64_t kept = 0;
    const auto insert = [&](int64_t index) {
        const float value = values[index];
        if (kept == wanted && !(value > found[kept - 1])) return;
        if (value != value) return;
        int64_t at = kept < wanted ? kept++ : kept - 1;
        for (; at > 0 && value > found[at - 1]; --at) found[at] = found[at - 1], indices[at] = indices[at - 1];
        found[at] = value;
        indices[at] = int32_t(index);
    };
    int64_t i = 0;
    for (; i < count && kept < wanted; ++i) insert(i);
    for (; i + W <= count; i += W) {
        if (!xsimd::any(V::load_unaligned(values + i) > V(found[kept - 1]))) continue;
        for (int64_t lane = 0; lane < W; ++lane) insert(i + lane);
    }
    for (; i < count; ++i) insert(i);
    return kept;
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const DecodeKernels decode_kernels{DEPTHLSTM_NAME(DEPTHLSTM_ISA),
                                   pack,
                                   round_rows,
                                   multiply,
                                   normalise,
                                   activate,
                                   attend_blocks,
                                   attend_queries,
                                   attend_cache,
                                   largest,
                                   log_sum,
                                   top};

}  // namespace depthlstm::DEPTHLSTM_ISA
