// The CPU kernels of siamese_step: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// One instruction set's kernels. The caller owns the memory, which is 64-byte aligned. It passes `packed` once a call,
// `scratch` once a thread, and `partial` (which the kernel zeroes) once a chunk of rows.
struct SiameseStepKernels {
    const char* isa;
    int64_t (*packed_bytes)(const SiameseStepCall&);
    int64_t (*scratch_bytes)(const SiameseStepCall&);
    int64_t (*partial_bytes)(const SiameseStepCall&);
    int64_t (*feature_blocks)(const SiameseStepCall&);
    void (*pack)(const SiameseStepCall&, void* packed);
    void (*forward)(const SiameseStepCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    void (*backward)(const SiameseStepCall&, const void* packed, void* scratch, void* partial, int64_t row_begin,
                     int64_t row_end);
    // sums `count` partials, in their order, into the parameters' gradients for a range of feature blocks
    void (*reduce)(const SiameseStepCall&, const void* partials, int64_t count, int64_t block_begin, int64_t block_end);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const SiameseStepKernels siamese_step_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const SiameseStepKernels* select_siamese_step_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::siamese_step_kernels,
    static constexpr const SiameseStepKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
