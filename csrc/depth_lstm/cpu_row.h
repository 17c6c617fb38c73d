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

// Reads a row of z into scratch, adds z_bias, and takes the statistics: n = r * scratch + shift. Scratch then holds
// z - mean as far as the mean is known. On a nearly constant row the mean's rounding error is most of the rest, and
// 1/sqrt(eps) would blow it up (z = 1000.3: h wrong by 0.4). The mean of the rest is therefore taken out, too.
//
// fp32 and fp64 take two passes. 16-bit types take one, which sums v - from and its square: `from` is the mean of the
// first vector of the gate, or of all gates for a joint norm. The difference is rounded by u = 2^-24 of itself, so a
// far mean costs nothing, and a constant row gives zeros.
// variance = E[(v - from)^2] - (mean - from)^2 loses a factor E[(v - from)^2] / variance of its digits. With m values
// in `from`, (mean - from)^2 <= D / m variance (Jensen's inequality), so the factor is at most 1 + D / m, and a first
// vector of outliers reaches it. A sum of D terms in W lanes errs by g = (D / W + log2 W + 2) u of its terms' absolute
// values at most, 4e-6 at D = 512 and 5e-4 at D = 65536, so the variance errs by 3 g E[(v - from)^2]. A row takes the
// second pass, from its mean, unless E[(v - from)^2] <= 4 (variance + eps). The variance then errs by 12 g (variance +
// eps) at most, 5e-5 at D = 512, and r by half of it; at D = 65536 rows made for it showed 2e-4 in c. Normal values
// fail that, sqrt(3) deviations for a mean of m = 8 values, in one row of a million.
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
    constexpr bool half = sizeof(MZ) == 2;
    const int64_t D = call.features;
    const MZ* z = row_of<MZ>(call.z, row);
    const T* z_bias = packed + 2 * K * W;
    const bool normalises = call.norm != Norm::none, joint = call.norm == Norm::joint;
    const auto average_if_joint = [joint](T(&of_gate)[K]) {
        if (!joint) return;
        T all = 0;
        for (int k = 0; k < K; ++k) all += of_gate[k];
        for (int k = 0; k < K; ++k) of_gate[k] = all / T(K);
    };
    const auto read = [&](auto part, int64_t block, int k, auto biased) __attribute__((always_inline)) {
        V v = part.load(z + k * D + block * W);
        if constexpr (biased) v += V::load_aligned(z_bias + (3 * block * K + k) * W);
        return v;
    };
    V sum[K], square[K];
    for (int k = 0; k < K; ++k) sum[k] = square[k] = V(T(0));
    const auto stage = [&](auto biased) __attribute__((always_inline)) {
        V from[K];
        if constexpr (half) {
            T first[K] = {};
            for (int k = 0; k < K && normalises; ++k) {
                const V values = D < W ? read(Partial{D}, 0, k, biased) : read(Whole{}, 0, k, biased);
                first[k] = xsimd::reduce_add(values) / T(D < W ? D : W);
            }
            average_if_joint(first);
            for (int k = 0; k < K; ++k) from[k] = V(first[k]);
        }
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            for (int k = 0; k < K; ++k) {
                V v = read(part, block, k, biased);
                if constexpr (half) {
                    v -= from[k];
                    if constexpr (std::is_same_v<decltype(part), Partial>) {
                        v = xsimd::select(first_lanes<T>(part.count), v, V(T(0)));
                    }
                    square[k] = xsimd::fma(v, v, square[k]);
                }
                v.store_aligned(staged + (block * K + k) * W);
                sum[k] += v;
            }
        });
    };
    if (call.z_bias == nullptr) {
        stage(std::false_type());
    } else {
        stage(std::true_type());
    }
    RowStatistics<T, K> found;
    for (int k = 0; k < K; ++k) found.r[k] = T(1), found.shift[k] = T(0);
    if (!normalises) return found;

    T mean[K], mean_square[K];
    for (int k = 0; k < K; ++k) mean[k] = xsimd::reduce_add(sum[k]) / T(D);
    average_if_joint(mean);
    bool again = !half;
    if constexpr (half) {
        for (int k = 0; k < K; ++k) mean_square[k] = xsimd::reduce_add(square[k]) / T(D);
        average_if_joint(mean_square);
        for (int k = 0; k < K; ++k) {  // NaN, too, is not sound
            const bool sound = mean_square[k] <= 4 * (mean_square[k] - mean[k] * mean[k] + T(call.eps));
            again = again || !sound;
        }
    }
    if (again) {
        V rest[K];
        for (int k = 0; k < K; ++k) square[k] = rest[k] = V(T(0));
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            for (int k = 0; k < K; ++k) {
                V centred = V::load_aligned(staged + (block * K + k) * W) - V(mean[k]);
                if constexpr (std::is_same_v<decltype(part), Partial>) {
                    centred = xsimd::select(first_lanes<T>(part.count), centred, V(T(0)));
                }
                centred.store_aligned(staged + (block * K + k) * W);
                square[k] = xsimd::fma(centred, centred, square[k]);
                rest[k] += centred;
            }
        });
        for (int k = 0; k < K; ++k) {
            mean_square[k] = xsimd::reduce_add(square[k]) / T(D);
            mean[k] = xsimd::reduce_add(rest[k]) / T(D);
        }
        average_if_joint(mean_square);
        average_if_joint(mean);
    }
    for (int k = 0; k < K; ++k) {
        const T variance = mean_square[k] - mean[k] * mean[k];
        const T factor = T(1) / std::sqrt((variance < T(0) ? T(0) : variance) + T(call.eps));
        found.r[k] = factor;
        found.shift[k] = -mean[k] * factor;
    }
    return found;
}

struct Given {};  // g comes from `hidden`

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
