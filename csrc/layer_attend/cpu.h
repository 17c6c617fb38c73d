// The CPU kernels of layer_attend: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// The caller owns the memory, which is 64-byte aligned. It passes `packed` once a call, `scratch` once a thread, and
// `partial`, which the kernel zeroes, once a chunk of rows.
struct LayerAttendKernels {
    const char* isa;
    int64_t (*packed_bytes)(const LayerAttendCall&);
    int64_t (*scratch_bytes)(const LayerAttendCall&);
    int64_t (*partial_bytes)(const LayerAttendCall&);
    void (*pack)(const LayerAttendCall&, void* packed);
    void (*forward)(const LayerAttendCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    // partial is null if no parameter's gradient is wanted
    void (*backward)(const LayerAttendCall&, const void* packed, void* scratch, void* partial, int64_t row_begin,
                     int64_t row_end);
    // sums `count` partials, in their order, into the parameters' gradients
    void (*reduce)(const LayerAttendCall&, const void* partials, int64_t count);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const LayerAttendKernels layer_attend_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const LayerAttendKernels* select_layer_attend_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::layer_attend_kernels,
    static constexpr const LayerAttendKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
