// The CPU gates kernels: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// One instruction set's kernels. The caller owns the memory, which is 64-byte aligned. It passes `packed` once a call,
// `scratch` once a thread, and `partial` (which the kernel zeroes) once a chunk of rows.
struct GatesKernels {
    const char* isa;
    int64_t (*packed_bytes)(const GatesCall&);
    int64_t (*scratch_bytes)(const GatesCall&);
    int64_t (*partial_bytes)(const GatesCall&);
    int64_t (*feature_blocks)(const GatesCall&);
    // packs for the forward pass if h.data is set, else for the backward pass; the two differ in their scale
    void (*pack)(const GatesCall&, void* packed);
    void (*forward)(const GatesCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    // partial may be null if no parameter gradient is wanted
    void (*backward)(const GatesCall&, const void* packed, void* scratch, void* partial, int64_t row_begin,
                     int64_t row_end);
    // sums `count` partials, in their order, into dweight, dbias and dz_bias for a range of feature blocks
    void (*reduce)(const GatesCall&, const void* partials, int64_t count, int64_t block_begin, int64_t block_end);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const GatesKernels gates_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const GatesKernels* select_gates_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::gates_kernels,
    static constexpr const GatesKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
