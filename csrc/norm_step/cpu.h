// The CPU kernels of norm_step: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// One instruction set's kernels. The caller owns the memory, which is 64-byte aligned. It passes `packed` once a call,
// `scratch` once a thread, and `partial` (which the kernel zeroes) once a chunk of rows.
struct NormStepKernels {
    const char* isa;
    int64_t (*packed_bytes)(const NormStepCall&);
    int64_t (*scratch_bytes)(const NormStepCall&);
    int64_t (*partial_bytes)(const NormStepCall&);
    int64_t (*feature_blocks)(const NormStepCall&);
    void (*pack)(const NormStepCall&, void* packed);
    void (*forward)(const NormStepCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    void (*backward)(const NormStepCall&, const void* packed, void* scratch, void* partial, int64_t row_begin,
                     int64_t row_end);
    // sums `count` partials, in their order, into the parameters' gradients for a range of feature blocks; the gradient
    // of a single b is one sum, made with the first block
    void (*reduce)(const NormStepCall&, const void* partials, int64_t count, int64_t block_begin, int64_t block_end);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const NormStepKernels norm_step_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const NormStepKernels* select_norm_step_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::norm_step_kernels,
    static constexpr const NormStepKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
