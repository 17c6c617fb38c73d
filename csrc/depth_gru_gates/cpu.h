// The CPU kernels of the depth-wise GRU: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// One instruction set's kernels. The caller owns the memory, which is 64-byte aligned. It passes `packed` once a call,
// `scratch` once a thread, and `partial` (which the kernel zeroes) once a chunk of rows.
struct GruKernels {
    // 0 without a LayerNorm
    int64_t (*packed_bytes)(const GruCall&);
    int64_t (*scratch_bytes)(const GruCall&);
    int64_t (*partial_bytes)(const GruCall&);
    int64_t (*feature_blocks)(const GruCall&);
    // packs for the forward pass if h_out.data is set, else for the backward pass; the two differ in their scale
    void (*pack)(const GruCall&, void* packed);
    void (*forward)(const GruCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    // partial may be null if no parameter gradient is wanted
    void (*backward)(const GruCall&, const void* packed, void* scratch, void* partial, int64_t row_begin,
                     int64_t row_end);
    // sums `count` partials, in their order, into dweight and dbias for a range of feature blocks
    void (*reduce)(const GruCall&, const void* partials, int64_t count, int64_t block_begin, int64_t block_end);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const GruKernels gru_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const GruKernels* select_gru_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::gru_kernels,
    static constexpr const GruKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
