// The decode engine's CPU kernels: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

struct DecodeKernels {
    const char* isa;
    // packs weight (outputs, inputs) and bias, which may be null, into the memory that `panels` names
    void (*pack)(const Panels& panels, const float* weight, const float* bias);
    void (*round_rows)(const ProductCall&);  // int8 only, before multiply
    void (*multiply)(const ProductCall&);
    void (*normalise)(const NormCall&);
    void (*activate)(Activation, float* x, int64_t count);
    void (*attend_blocks)(const BlockAttention&);  // of one query
    void (*attend_queries)(const BlockAttention&);
    void (*attend_cache)(const CacheAttention&);
    // the first of the largest values; -1 where one of them is NaN
    int64_t (*largest)(const float* values, int64_t count);
    // log(sum(exp(values - max))), and the maximum; NaN where a value is NaN or infinite
    float (*log_sum)(const float* values, int64_t count, float* maximum);
    // the `wanted` largest in falling order, of equal ones the first first; returns how many there are
    int64_t (*top)(const float* values, int64_t count, int64_t wanted, float* found, int32_t* indices);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const DecodeKernels decode_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const DecodeKernels* select_decode_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::decode_kernels,
    static constexpr const DecodeKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
