// The CPU kernels of layer_mix: one table of functions for each instruction set.
#pragma once

#include "call.h"
#include "common/cpu/isa.h"

namespace depthlstm {

// The work is cut into items: a tile of the features of one row, of every source. The caller owns the memory, which is
// 64-byte aligned. It passes `packed` once a call, `scratch` once a thread, and `partial` once a chunk of items.
struct LayerMixKernels {
    const char* isa;
    int64_t (*items)(const LayerMixCall&);
    int64_t (*packed_bytes)(const LayerMixCall&);
    int64_t (*scratch_bytes)(const LayerMixCall&);
    void (*pack)(const LayerMixCall&, void* packed);
    void (*forward)(const LayerMixCall&, const void* packed, void* scratch, int64_t begin, int64_t end);
    // adds to partial (L, V)
    void (*backward)(const LayerMixCall&, const void* packed, void* scratch, double* partial, int64_t begin,
                     int64_t end);
    // sums `count` partials, in their order, into dweights
    void (*reduce)(const LayerMixCall&, const double* partials, int64_t count);
};

#define DEPTHLSTM_DECLARE(isa) \
    namespace isa { extern const LayerMixKernels layer_mix_kernels; }
DEPTHLSTM_ISAS(DEPTHLSTM_DECLARE)
#undef DEPTHLSTM_DECLARE

// The kernels of chosen_isa(); null for none.
[[maybe_unused]] static const LayerMixKernels* select_layer_mix_kernels() {
#define DEPTHLSTM_TABLE(isa) &isa::layer_mix_kernels,
    static constexpr const LayerMixKernels* tables[] = {DEPTHLSTM_ISAS(DEPTHLSTM_TABLE)};
#undef DEPTHLSTM_TABLE
    return chosen_kernels(tables);
}

}  // namespace depthlstm
