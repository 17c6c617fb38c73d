// The depth-wise GRU after its products, forward and backward. This file is compiled once for each instruction set.
//
// The kernels make one pass over memory. With a LayerNorm on each gate a row of z is converted into scratch that stays
// in cache, where the statistics and the two LayerNorm means are taken. Without one a row is read, computed and written
// block by block. Scratch, affine and partial sums are stored by blocks of one vector, [block][gate][lane], because
// gates 2^n bytes apart would share cache sets. The lanes of the last block past C hold zeros in z, h, the gradient and
// gamma, so that they add nothing to sums.
#include <cmath>

#include "common/cpu/rows.h"
#include "cpu.h"
#include "math.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int K = gru_gates;

bool computes_double(const GruCall& call) { return call.z_dtype == DType::float64; }
int64_t lanes(const GruCall& call) { return computes_double(call) ? width<double> : width<float>; }
int64_t feature_blocks(const GruCall& call) { return (call.features + lanes(call) - 1) / lanes(call); }
// Of `vectors` vectors a block.
int64_t row_bytes(const GruCall& call, int64_t vectors) {
    return feature_blocks(call) * lanes(call) * vectors * (computes_double(call) ? 8 : 4);
}

// packed: [block][gamma_0.., beta_0..][lane]
int64_t packed_bytes(const GruCall& call) { return call.weight == nullptr ? 0 : row_bytes(call, 2 * K); }
// scratch: z [block][gate][lane], u [block][gate][lane]
int64_t scratch_bytes(const GruCall& call) { return call.weight == nullptr ? 0 : row_bytes(call, 2 * K); }
// partial: [block][dgamma_0.., dbeta_0..][lane]
int64_t partial_bytes(const GruCall& call) { return call.weight == nullptr ? 0 : row_bytes(call, 2 * K); }

template <class T>
Vector<T> read_as(DType dtype, const void* data, int64_t index, int64_t count) {
    if constexpr (sizeof(T) == 8) {
        return load_part(static_cast<const double*>(data) + index, count);
    } else {
        switch (dtype) {
            case DType::bfloat16: return load_part(static_cast<const BFloat16*>(data) + index, count);
            case DType::float16: return load_part(static_cast<const Float16*>(data) + index, count);
            default: return load_part(static_cast<const float*>(data) + index, count);
        }
    }
}

template <class T>
void write_as(DType dtype, void* data, int64_t index, Vector<T> v, int64_t count) {
    if constexpr (sizeof(T) == 8) {
        store_part(static_cast<double*>(data) + index, v, count);
    } else {
        switch (dtype) {
            case DType::bfloat16: return store_part(static_cast<BFloat16*>(data) + index, v, count);
            case DType::float16: return store_part(static_cast<Float16*>(data) + index, v, count);
            default: return store_part(static_cast<float*>(data) + index, v, count);
        }
    }
}

// tanh x = 2 sigmoid(2 x) - 1, so the rows of n and m carry twice the scale of a sigmoid.
constexpr double forward_scale(int gate) { return gate < 2 ? minus_log2_e : 2 * minus_log2_e; }

template <class T>
void pack_as(const GruCall& call, T* packed) {
    constexpr int64_t W = width<T>;
    const int64_t blocks = feature_blocks(call), C = call.features;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t d = block * W, count = C - d < W ? C - d : W;
        for (int k = 0; k < K; ++k) {
            T* at = packed + (2 * block * K + k) * W;
            Vector<T> gamma = read_as<T>(call.weight_dtype, call.weight, k * C + d, count);
            Vector<T> beta = read_as<T>(call.bias_dtype, call.bias, k * C + d, count);
            if (call.h_out.data != nullptr) {  // forward: see sigmoid_of_scaled in common/activations.h
                gamma *= Vector<T>(T(forward_scale(k)));
                beta *= Vector<T>(T(forward_scale(k)));
            }
            gamma.store_aligned(at);
            beta.store_aligned(at + K * W);
        }
    }
}

void pack(const GruCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

// n = r * scratch + shift, for each gate.
template <class T>
struct RowStatistics {
    T r[K], shift[K];
};

// Reads a row of z into scratch and takes the statistics in two passes: n = r * scratch + shift. Scratch then holds z -
// mean as far as the mean is known. On a nearly constant row the mean's rounding error is most of the rest, and
// 1/sqrt(eps) would blow it up, so the second pass takes the mean of the rest too. Not inlined: forward and backward
// share it.
template <class MZ>
__attribute__((noinline)) RowStatistics<typename ComputeType<MZ>::type> stage_row(
    const GruCall& call, int64_t row, typename ComputeType<MZ>::type* staged) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t C = call.features;
    const MZ* z = row_of<MZ>(call.z, row);
    V sum[K], rest[K];
    for (int k = 0; k < K; ++k) sum[k] = V(T(0));
    for_blocks<W>(C, [&](auto part, int64_t block) __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) {
            const V v = part.load(z + k * C + block * W);
            v.store_aligned(staged + (block * K + k) * W);
            sum[k] += v;
        }
    });
    T mean[K];
    for (int k = 0; k < K; ++k) mean[k] = xsimd::reduce_add(sum[k]) / T(C), sum[k] = rest[k] = V(T(0));
    for_blocks<W>(C, [&](auto part, int64_t block) __attribute__((always_inline)) {
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
    RowStatistics<T> found;
    for (int k = 0; k < K; ++k) {
        const T left = xsimd::reduce_add(rest[k]) / T(C);
        const T variance = xsimd::reduce_add(sum[k]) / T(C) - left * left;
        found.r[k] = T(1) / std::sqrt((variance < T(0) ? T(0) : variance) + T(call.eps));
        found.shift[k] = -left * found.r[k];
    }
    return found;
}

inline void finish_stores([[maybe_unused]] const GruCall& call) {
#if defined(__x86_64__)
    if (call.stream) _mm_sfence();
#endif
}

template <class MZ, class MH, bool normed, bool fast>
void forward_rows(const GruCall& call, const void* packed_memory, void* scratch, int64_t row_begin, int64_t row_end) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t C = call.features;
    const bool stream = call.stream;
    [[maybe_unused]] const T* packed = static_cast<const T*>(packed_memory);
    [[maybe_unused]] T* staged = static_cast<T*>(scratch);

    for (int64_t row = row_begin; row < row_end; ++row) {
        [[maybe_unused]] V r[K], shift[K];
        if constexpr (normed) {
            const RowStatistics<T> of_row = stage_row<MZ>(call, row, staged);
            for (int k = 0; k < K; ++k) r[k] = V(of_row.r[k]), shift[k] = V(of_row.shift[k]);
        }
        const MZ* z = row_of<MZ>(call.z, row);
        const MH* h = row_of<MH>(call.h, row);
        MH* h_out = row_of<MH>(call.h_out, row);
        // the next row is fetched during the computation of this one; otherwise the two take turns
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MZ* next_z = row_of<MZ>(call.z, ahead);
        const MH* next_h = row_of<MH>(call.h, ahead);
        for_blocks<W>(C, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            for (int k = 0; k < K; ++k) prefetch(next_z + k * C + d);
            prefetch(next_h + d);
            V a[K];
            for (int k = 0; k < K; ++k) {
                if constexpr (normed) {
                    const V n = xsimd::fma(V::load_aligned(staged + (block * K + k) * W), r[k], shift[k]);
                    const T* gamma = packed + (2 * block * K + k) * W;
                    a[k] = xsimd::fma(n, V::load_aligned(gamma), V::load_aligned(gamma + K * W));
                } else {
                    a[k] = V(part.load(z + k * C + d)) * V(T(forward_scale(k)));
                }
            }
            Group<V, 2> gates;
            gates.v[0] = a[0], gates.v[1] = a[1];
            gates = sigmoid_of_scaled<fast>(gates);
            const V s = sigmoid_of_scaled<fast>(V(xsimd::fma(gates.v[0], a[3], a[2])));
            const V n = xsimd::fma(s, V(T(2)), V(T(-1)));
            part.store(h_out + d, gru_forward(gates.v[1], n, V(part.load(h + d))), stream);
        });
    }
    finish_stores(call);
}

// dz of a row from u = gamma da and n, given their sums over the blocks. Not inlined, as stage_row.
template <class MZ>
__attribute__((noinline)) void finish_row(const GruCall& call, int64_t row,
                                          const RowStatistics<typename ComputeType<MZ>::type>& statistics,
                                          const Vector<typename ComputeType<MZ>::type> (&sum_u)[K],
                                          const Vector<typename ComputeType<MZ>::type> (&sum_un)[K],
                                          const typename ComputeType<MZ>::type* normalised,
                                          const typename ComputeType<MZ>::type* u_row) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t C = call.features;
    MZ* dz = row_of<MZ>(call.dz, row);
    // dz_k = r_k (u - mean(u) - n mean(u n)). In this order a constant row's difference cancels before the factor r_k =
    // 1/sqrt(eps).
    V mean_u[K], mean_un[K];
    for (int k = 0; k < K; ++k) {
        mean_u[k] = V(xsimd::reduce_add(sum_u[k]) / T(C));
        mean_un[k] = V(xsimd::reduce_add(sum_un[k]) / T(C));
    }
    for_blocks<W>(C, [&](auto part, int64_t block) __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) {
            const V u = V::load_aligned(u_row + (block * K + k) * W);
            const V n = V::load_aligned(normalised + (block * K + k) * W);
            const V v = V(statistics.r[k]) * xsimd::fnma(n, mean_un[k], u - mean_u[k]);
            part.store(dz + k * C + block * W, v, call.stream);
        }
    });
}

template <class MZ, class MH, bool normed, bool fast>
void backward_rows(const GruCall& call, const void* packed_memory, void* scratch, void* partial_memory,
                   int64_t row_begin, int64_t row_end) {
    using T = typename ComputeType<MZ>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t C = call.features;
    const bool stream = call.stream;
    [[maybe_unused]] const T* packed = static_cast<const T*>(packed_memory);
    [[maybe_unused]] T* normalised = static_cast<T*>(scratch);
    [[maybe_unused]] T* u_row = normalised + feature_blocks(call) * K * W;
    [[maybe_unused]] T* partial = static_cast<T*>(partial_memory);
    if (normed && partial != nullptr) std::memset(partial, 0, std::size_t(partial_bytes(call)));

    for (int64_t row = row_begin; row < row_end; ++row) {
        [[maybe_unused]] RowStatistics<T> of_row;
        [[maybe_unused]] V r[K], shift[K], sum_u[K], sum_un[K];
        if constexpr (normed) {
            of_row = stage_row<MZ>(call, row, normalised);
            for (int k = 0; k < K; ++k) {
                r[k] = V(of_row.r[k]), shift[k] = V(of_row.shift[k]);
                sum_u[k] = sum_un[k] = V(T(0));
            }
        }
        const MZ* z = row_of<MZ>(call.z, row);
        const MH *h = row_of<MH>(call.h, row), *dh_out = row_of<MH>(call.dh_out, row);
        MZ* dz = row_of<MZ>(call.dz, row);
        MH* dh = row_of<MH>(call.dh, row);
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MZ* next_z = row_of<MZ>(call.z, ahead);
        const MH *next_h = row_of<MH>(call.h, ahead), *next_dh_out = row_of<MH>(call.dh_out, ahead);
        for_blocks<W>(C, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            for (int k = 0; k < K; ++k) prefetch(next_z + k * C + d);
            prefetch(next_h + d);
            prefetch(next_dh_out + d);
            [[maybe_unused]] V n[K];
            V a[K];
            for (int k = 0; k < K; ++k) {
                if constexpr (normed) {
                    n[k] = xsimd::fma(V::load_aligned(normalised + (block * K + k) * W), r[k], shift[k]);
                    const T* gamma = packed + (2 * block * K + k) * W;
                    a[k] = xsimd::fma(n[k], V::load_aligned(gamma), V::load_aligned(gamma + K * W));
                } else {
                    a[k] = part.load(z + k * C + d);
                }
            }
            Group<V, 2> gates;
            gates.v[0] = a[0], gates.v[1] = a[1];
            gates = sigmoid<fast>(gates);
            V value, slope;
            Tanh::template value_and_slope<fast>(V(xsimd::fma(gates.v[0], a[3], a[2])), value, slope);
            const GruGradient<V> gradient =
                gru_backward(gates.v[0], gates.v[1], value, slope, a[3], V(part.load(h + d)), V(part.load(dh_out + d)));
            part.store(dh + d, gradient.dh, stream);
            for (int k = 0; k < K; ++k) {
                if constexpr (normed) {
                    if (partial != nullptr) {
                        T* dgamma = partial + (2 * block * K + k) * W;
                        T* dbeta = dgamma + K * W;
                        xsimd::fma(gradient.da[k], n[k], V::load_aligned(dgamma)).store_aligned(dgamma);
                        (V::load_aligned(dbeta) + gradient.da[k]).store_aligned(dbeta);
                    }
                    const V u = gradient.da[k] * V::load_aligned(packed + (2 * block * K + k) * W);
                    sum_u[k] += u;
                    sum_un[k] = xsimd::fma(u, n[k], sum_un[k]);
                    u.store_aligned(u_row + (block * K + k) * W);
                    n[k].store_aligned(normalised + (block * K + k) * W);
                } else {
                    part.store(dz + k * C + d, gradient.da[k], stream);
                }
            }
        });
        if constexpr (normed) finish_row<MZ>(call, row, of_row, sum_u, sum_un, normalised, u_row);
    }
    finish_stores(call);
}

template <class T>
void reduce_as(const GruCall& call, const T* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    constexpr int64_t W = width<T>;
    const int64_t C = call.features, stride = partial_bytes(call) / int64_t(sizeof(T));
    for (int64_t block = block_begin; block < block_end; ++block) {
        for (int j = 0; j < 2 * K; ++j) {
            Vector<T> sum(T(0));
            for (int64_t p = 0; p < count; ++p)
                sum += Vector<T>::load_aligned(partials + p * stride + (2 * block * K + j) * W);
            const int64_t d = block * W, at = (j % K) * C + d;
            write_as<T>(j < K ? call.weight_dtype : call.bias_dtype, j < K ? call.dweight : call.dbias, at, sum,
                        C - d < W ? C - d : W);
        }
    }
}

void reduce(const GruCall& call, const void* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count, block_begin, block_end);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count, block_begin, block_end);
    }
}

template <class MZ, class MH, bool fast, class Visitor>
void with_norm(const GruCall& call, Visitor visit) {
    if (call.weight == nullptr) return visit.template operator()<MZ, MH, false, fast>();
    return visit.template operator()<MZ, MH, true, fast>();
}

// The fast formulas are for calls that round every result to 16 bits. One float32 operand asks for float32 results.
template <class M, class Visitor>
void with_half(const GruCall& call, Visitor visit) {
    const bool wide_affine =
        call.weight != nullptr && (call.weight_dtype == DType::float32 || call.bias_dtype == DType::float32);
    if (call.h_dtype == DType::float32) return with_norm<M, float, false>(call, visit);
    if (wide_affine) return visit.template operator()<M, M, true, false>();
    return with_norm<M, M, true>(call, visit);
}

// avx512_bf16 differs from avx512 in its stores of bfloat16. It has kernels for z of that type and passes every other
// call on.
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
bool is_of_avx512(const GruCall& call) { return call.z_dtype != DType::bfloat16; }
template <class Visitor>
void with_types(const GruCall& call, Visitor visit) {
    with_half<BFloat16>(call, visit);
}
#else
template <class Visitor>
void with_types(const GruCall& call, Visitor visit) {
    switch (call.z_dtype) {
        case DType::float32: return with_norm<float, float, false>(call, visit);
        case DType::float64: return with_norm<double, double, false>(call, visit);
        case DType::bfloat16: return with_half<BFloat16>(call, visit);
        case DType::float16: return with_half<Float16>(call, visit);
    }
}
#endif

void forward(const GruCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gru_kernels.forward(call, packed, scratch, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MH, bool normed, bool fast>() {
        forward_rows<MZ, MH, normed, fast>(call, packed, scratch, row_begin, row_end);
    });
}

void backward(const GruCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gru_kernels.backward(call, packed, scratch, partial, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MH, bool normed, bool fast>() {
        backward_rows<MZ, MH, normed, fast>(call, packed, scratch, partial, row_begin, row_end);
    });
}

}  // namespace

const GruKernels gru_kernels{packed_bytes, scratch_bytes, partial_bytes, feature_blocks,
                             pack,         forward,       backward,      reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
