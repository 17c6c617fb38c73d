// The forward pass over rows.
#pragma once

#include "cpu_row.h"
#include "math.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

template <class MZ, class MC, class Act, bool fast>
void forward_rows(const GatesCall& call, const void* packed_memory, void* scratch, int64_t row_begin, int64_t row_end) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    constexpr bool given = std::is_same_v<Act, Given>;
    constexpr int K = given ? 3 : 4;
    const int64_t D = call.features;
    const T* packed = static_cast<const T*>(packed_memory);
    T* staged = static_cast<T*>(scratch);
    T* factor = staged + 2 * K * feature_blocks(call) * W;
    const bool dropout = call.dropout_p > 0, stream = call.stream;

    for (int64_t row = row_begin; row < row_end; ++row) {
        const RowStatistics<T, K> of_row = stage_row<MZ, K>(call, row, packed, staged);
        V r[K], shift[K];
        for (int k = 0; k < K; ++k) r[k] = V(of_row.r[k]), shift[k] = V(of_row.shift[k]);
        if (dropout) dropout_factors(call, row, factor);
        const MC* c_in = row_of<MC>(call.c, row);
        const MZ* hidden = row_of<MZ>(given ? call.hidden : call.z, row);
        MZ* h_out = row_of<MZ>(call.h, row);
        MC* c_out = row_of<MC>(call.c_out, row);
        // the next row is fetched during the computation of this one; otherwise the two take turns
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MZ* next_z = row_of<MZ>(call.z, ahead);
        const MC* next_c = row_of<MC>(call.c, ahead);
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            for (int k = 0; k < K; ++k) prefetch(next_z + k * D + d);
            prefetch(next_c + d);
            V a[K];
            for (int k = 0; k < K; ++k) {
                const V n = xsimd::fma(V::load_aligned(staged + (block * K + k) * W), r[k], shift[k]);
                const T* gamma = packed + (3 * block * K + k) * W;
                a[k] = xsimd::fma(n, V::load_aligned(gamma), V::load_aligned(gamma + K * W));
            }
            V g;
            if constexpr (given) {
                g = part.load(hidden + d);
            } else {
                g = Act::template value<fast>(a[3]);
            }
            if (dropout) g *= V::load_unaligned(factor + d);
            Group<V, 3> ifo;
            for (int k = 0; k < 3; ++k) ifo.v[k] = a[k];
            ifo = sigmoid_of_scaled<fast>(ifo);
            V c, h;
            cell_forward(ifo.v[0], ifo.v[1], ifo.v[2], g, part.load(c_in + d), c, h);
            part.template store<fast>(c_out + d, c, stream);
            part.template store<fast>(h_out + d, h, stream);
        });
    }
#if defined(__x86_64__)
    if (call.stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
