// What forward and backward share on a row: sizes of the memory, dropout factors, statistics.
//
// The kernels make one pass over memory. A row of z is converted into a scratch row that stays in L1/L2. Statistics,
// gates and, backward, the two LayerNorm means are taken there. Scratch, affine and partial sums are stored by blocks
// of one vector, [block][gate][lane]. Rows 2^n bytes apart would fall into the same cache sets, and a block is one
// stream to prefetch. The lanes of the last block past D hold zeros in z, c, the gradients and gamma, so that they add
// nothing to sums.
#pragma once

#include "common/cpu/rows.h"
#include "common/philox.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool computes_double(const GatesCall& call) { return call.z_dtype == DType::float64; }
int gate_count(const GatesCall& call) { return call.activation == Activation::given ? 3 : 4; }
int64_t lanes(const GatesCall& call) { return computes_double(call) ? width<double> : width<float>; }
int64_t feature_blocks(const GatesCall& call) { return (call.features + lanes(call) - 1) / lanes(call); }
int64_t row_bytes(const GatesCall& call, int64_t vectors) {
    return round_up(feature_blocks(call) * lanes(call) * vectors * (computes_double(call) ? 8 : 4), 64);
}

// packed: [block][gamma_0.., beta_0.., z_bias_0..][lane]
int64_t packed_bytes(const GatesCall& call) { return row_bytes(call, 3 * gate_count(call)); }
// scratch: z [block][gate][lane], u [block][gate][lane], dropout factors [feature], with room for Philox to overrun
int64_t scratch_bytes(const GatesCall& call) { return row_bytes(call, 2 * gate_count(call) + 1) + 1024; }
// partial: [block][dgamma_0.., dbeta_0.., dz_bias_0..][lane]
int64_t partial_bytes(const GatesCall& call) { return row_bytes(call, 3 * gate_count(call)); }

// factor[d] = 1 / (1 - p) where feature d of the row is kept, else 0. It is filled to the end of the last block,
// because 0 * NaN would be NaN.
template <class T>
__attribute__((noinline)) void dropout_factors(const GatesCall& call, int64_t row, T* factor) {
    const uint32_t threshold = uint32_t(call.dropout_p * 4294967296.0);
    const T kept = T(1 / (1 - call.dropout_p));
    const int64_t padded = round_up(call.features, width<T>);
    constexpr int group = 16;  // Philox blocks side by side, which the compiler vectorises
    for (int64_t first = 0; first * 4 < padded; first += group) {
        uint32_t words[4][group];
        for (int j = 0; j < group; ++j) {
            uint32_t out[4];
            philox(call.seed, uint64_t(row), uint32_t(first + j), out);
            for (int w = 0; w < 4; ++w) words[w][j] = out[w];
        }
        for (int j = 0; j < group && (first + j) * 4 < padded; ++j) {
            for (int w = 0; w < 4; ++w) factor[(first + j) * 4 + w] = words[w][j] >= threshold ? kept : T(0);
        }
    }
}

// n = r * scratch + shift, for K gates.
template <class T, int K>
struct RowStatistics {
    T r[K], shift[K];
};

// Reads a row of z into scratch, adds z_bias, and takes the statistics in two passes: n = r * scratch + shift. Scratch
// then holds z - mean as far as the mean is known. On a nearly constant row the mean's rounding error is most of the
// rest, and 1/sqrt(eps) would blow it up (z = 1000.3: h wrong by 0.4). The second pass therefore takes the mean of the
// rest too.
// Not inlined: it is the same for every activation, and 112 copies of it took as long to compile as all the rest. The
// call costs 20 to 40 ns a row. With avx2, fp32, in the cache this is 1 to 3 % of forward and of backward at D=512, 5
// to 10 % and 5 to 6 % at D=100, 8 to 17 % and 3 to 9 % at D=5.
template <class MZ, int K>
__attribute__((noinline)) RowStatistics<typename ComputeType<MZ>::type, K> stage_row(
    const GatesCall& call, int64_t row, const typename ComputeType<MZ>::type* packed,
    typename ComputeType<MZ>::type* staged) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t D = call.features;
    const MZ* z = row_of<MZ>(call.z, row);
    const T* z_bias = packed + 2 * K * W;
    V sum[K];
    for (int k = 0; k < K; ++k) sum[k] = V(T(0));
    const auto stage = [&](auto part, int64_t block, auto biased) __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) {
            V v = part.load(z + k * D + block * W);
            if constexpr (biased) v += V::load_aligned(z_bias + (3 * block * K + k) * W);
            v.store_aligned(staged + (block * K + k) * W);
            sum[k] += v;
        }
    };
    if (call.z_bias == nullptr) {
        for_blocks<W>(
            D, [&](auto part, int64_t block) __attribute__((always_inline)) { stage(part, block, std::false_type()); });
    } else {
        for_blocks<W>(
            D, [&](auto part, int64_t block) __attribute__((always_inline)) { stage(part, block, std::true_type()); });
    }
    RowStatistics<T, K> found;
    for (int k = 0; k < K; ++k) found.r[k] = T(1), found.shift[k] = T(0);
    if (call.norm == Norm::none) return found;

    T mean[K], square[K];
    for (int k = 0; k < K; ++k) mean[k] = xsimd::reduce_add(sum[k]) / T(D);
    if (call.norm == Norm::joint) {
        T all = 0;
        for (int k = 0; k < K; ++k) all += mean[k];
        for (int k = 0; k < K; ++k) mean[k] = all / T(K);
    }
    V rest[K];
    for (int k = 0; k < K; ++k) sum[k] = rest[k] = V(T(0));
    for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) {
            V centred = V::load_aligned(staged + (block * K + k) * W) - V(mean[k]);
            if constexpr (std::is_same_v<decltype(part), Partial>) {
                centred = xsimd::select(first_lanes<T>(part.count), centred, V(T(0)));
            }
            centred.store_aligned(staged + (block * K + k) * W);
            sum[k] = xsimd::fma(centred, centred, sum[k]);
            rest[k] += centred;
        }
    });
    T left[K];
    for (int k = 0; k < K; ++k)
        square[k] = xsimd::reduce_add(sum[k]) / T(D), left[k] = xsimd::reduce_add(rest[k]) / T(D);
    if (call.norm == Norm::joint) {
        T all_square = 0, all_left = 0;
        for (int k = 0; k < K; ++k) all_square += square[k], all_left += left[k];
        for (int k = 0; k < K; ++k) square[k] = all_square / T(K), left[k] = all_left / T(K);
    }
    for (int k = 0; k < K; ++k) {
        const T variance = square[k] - left[k] * left[k];
        const T factor = T(1) / std::sqrt((variance < T(0) ? T(0) : variance) + T(call.eps));
        found.r[k] = factor;
        found.shift[k] = -left[k] * factor;
    }
    return found;
}

struct Given {};  // g comes from `hidden`

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
