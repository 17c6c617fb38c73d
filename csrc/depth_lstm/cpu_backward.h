// The backward pass over rows.
#pragma once

#include "cpu_row.h"
#include "math.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

// dz of a row from u = gamma da and n, given their sums over the blocks. The sums of dz for z_bias go to `partial`, if
// there is one. Not inlined, as stage_row.
template <class MZ, int K, bool fast>
__attribute__((noinline)) void finish_row(const GatesCall& call, int64_t row,
                                          const RowStatistics<typename ComputeType<MZ>::type, K>& statistics,
                                          const Vector<typename ComputeType<MZ>::type> (&sum_u)[K],
                                          const Vector<typename ComputeType<MZ>::type> (&sum_un)[K],
                                          const typename ComputeType<MZ>::type* normalised,
                                          const typename ComputeType<MZ>::type* u_row,
                                          typename ComputeType<MZ>::type* partial) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t D = call.features;
    MZ* dz = row_of<MZ>(call.dz, row);
    // dz_k = r_k (u - mean(u) - n mean(u n)). In this order a constant row's difference cancels before the factor r_k =
    // 1/sqrt(eps).
    const bool normalises = call.norm != Norm::none;
    V mean_u[K], mean_un[K];
    T total_u = 0, total_un = 0;
    for (int k = 0; k < K; ++k) total_u += xsimd::reduce_add(sum_u[k]), total_un += xsimd::reduce_add(sum_un[k]);
    for (int k = 0; k < K; ++k) {
        const bool joint = call.norm == Norm::joint;
        mean_u[k] = V(joint ? total_u / T(K * D) : xsimd::reduce_add(sum_u[k]) / T(D));
        mean_un[k] = V(joint ? total_un / T(K * D) : xsimd::reduce_add(sum_un[k]) / T(D));
    }
    for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) {
            V v = V::load_aligned(u_row + (block * K + k) * W);
            if (normalises) {
                const V n = V::load_aligned(normalised + (block * K + k) * W);
                v = V(statistics.r[k]) * xsimd::fnma(n, mean_un[k], v - mean_u[k]);
            }
            part.template store<fast>(dz + k * D + block * W, v, call.stream);
            if (partial != nullptr) {
                T* sum = partial + ((3 * block + 2) * K + k) * W;
                (V::load_aligned(sum) + v).store_aligned(sum);
            }
        }
    });
}

template <class MZ, class MC, class Act, bool fast>
void backward_rows(const GatesCall& call, const void* packed_memory, void* scratch, void* partial_memory,
                   int64_t row_begin, int64_t row_end) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    constexpr bool given = std::is_same_v<Act, Given>;
    constexpr int K = given ? 3 : 4;
    const int64_t D = call.features;
    const int64_t row_elements = K * feature_blocks(call) * W;
    const T* packed = static_cast<const T*>(packed_memory);
    T* normalised = static_cast<T*>(scratch);
    T* u_row = normalised + row_elements;
    T* factor = u_row + row_elements;
    T* partial = static_cast<T*>(partial_memory);
    const bool dropout = call.dropout_p > 0, stream = call.stream;
    const bool affine_gradient = partial != nullptr && call.dweight != nullptr;
    const bool z_bias_gradient = partial != nullptr && call.dz_bias != nullptr;
    if (partial != nullptr) std::memset(partial, 0, std::size_t(partial_bytes(call)));

    for (int64_t row = row_begin; row < row_end; ++row) {
        const RowStatistics<T, K> of_row = stage_row<MZ, K>(call, row, packed, normalised);
        V r[K], shift[K];
        for (int k = 0; k < K; ++k) r[k] = V(of_row.r[k]), shift[k] = V(of_row.shift[k]);
        if (dropout) dropout_factors(call, row, factor);
        const MC *c_in = row_of<MC>(call.c, row), *dc = row_of<MC>(call.dc, row);
        const MZ *dh = row_of<MZ>(call.dh, row), *hidden = row_of<MZ>(given ? call.hidden : call.dh, row);
        MC* dc_in = row_of<MC>(call.dc_in, row);
        MZ* dhidden = row_of<MZ>(given ? call.dhidden : call.dz, row);
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MZ *next_z = row_of<MZ>(call.z, ahead), *next_dh = row_of<MZ>(call.dh, ahead);
        const MC *next_c = row_of<MC>(call.c, ahead), *next_dc = row_of<MC>(call.dc, ahead);
        V sum_u[K], sum_un[K];
        for (int k = 0; k < K; ++k) sum_u[k] = sum_un[k] = V(T(0));

        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            for (int k = 0; k < K; ++k) prefetch(next_z + k * D + d);
            prefetch(next_c + d);
            prefetch(next_dh + d);
            prefetch(next_dc + d);
            V n[K], a[K];
            for (int k = 0; k < K; ++k) {
                n[k] = xsimd::fma(V::load_aligned(normalised + (block * K + k) * W), r[k], shift[k]);
                const T* gamma = packed + (3 * block * K + k) * W;
                a[k] = xsimd::fma(n[k], V::load_aligned(gamma), V::load_aligned(gamma + K * W));
            }
            V g, slope;
            if constexpr (given) {
                g = part.load(hidden + d);
            } else {
                Act::template value_and_slope<fast>(a[3], g, slope);
            }
            V keep(T(1));
            if (dropout) keep = V::load_unaligned(factor + d);
            g *= keep;
            Group<V, 3> ifo;
            for (int k = 0; k < 3; ++k) ifo.v[k] = a[k];
            ifo = sigmoid<fast>(ifo);
            const CellGradient<V> gradient = cell_backward(ifo.v[0], ifo.v[1], ifo.v[2], g, part.load(c_in + d),
                                                           part.load(dh + d), part.load(dc + d));
            part.template store<fast>(dc_in + d, gradient.dc_in, stream);
            V da[K];
            da[0] = gradient.da_i, da[1] = gradient.da_f, da[2] = gradient.da_o;
            if constexpr (given) {
                part.template store<fast>(dhidden + d, gradient.dg * keep, stream);
            } else {
                da[3] = gradient.dg * keep * slope;
            }
            for (int k = 0; k < K; ++k) {
                if (affine_gradient) {
                    T* dgamma = partial + (3 * block * K + k) * W;
                    T* dbeta = dgamma + K * W;
                    xsimd::fma(da[k], n[k], V::load_aligned(dgamma)).store_aligned(dgamma);
                    (V::load_aligned(dbeta) + da[k]).store_aligned(dbeta);
                }
                const V u = da[k] * V::load_aligned(packed + (3 * block * K + k) * W);
                sum_u[k] += u;
                sum_un[k] = xsimd::fma(u, n[k], sum_un[k]);
                u.store_aligned(u_row + (block * K + k) * W);
                n[k].store_aligned(normalised + (block * K + k) * W);
            }
        });

        finish_row<MZ, K, fast>(call, row, of_row, sum_u, sum_un, normalised, u_row,
                                z_bias_gradient ? partial : nullptr);
    }
#if defined(__x86_64__)
    if (call.stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
