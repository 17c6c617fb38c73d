// Gates of the depth-wise LSTM, forward and backward. This file is compiled once for each instruction set.
//
// The kernels make one pass over memory. A row of z is converted into a scratch row that stays in L1/L2. Statistics,
// gates and, backward, the two LayerNorm means are taken there. Scratch, affine and partial sums are stored by blocks
// of one vector, [block][gate][lane]. Rows 2^n bytes apart would fall into the same cache sets, and a block is one
// stream to prefetch. The lanes of the last block past D hold zeros in z, c, the gradients and gamma, so that they add
// nothing to sums.
#include "common/cpu/rows.h"
#include "common/philox.h"
#include "cpu.h"
#include "math.h"

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

template <class T>
void pack_as(const GatesCall& call, T* packed) {
    constexpr int64_t W = width<T>;
    const int gates = gate_count(call);
    const int64_t blocks = feature_blocks(call), D = call.features;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t d = block * W, count = D - d < W ? D - d : W;
        for (int k = 0; k < gates; ++k) {
            T* at = packed + (block * 3 * gates + k) * W;
            Vector<T> gamma(T(0)), beta(T(0)), z_bias(T(0));
            if (call.weight != nullptr) {
                gamma = read_as<T>(call.affine_dtype, call.weight, k * D + d, count);
                beta = read_as<T>(call.affine_dtype, call.bias, k * D + d, count);
            } else {
                gamma = xsimd::select(first_lanes<T>(count), Vector<T>(T(1)), gamma);
            }
            if (k < 3 && call.h.data != nullptr) {  // forward: see sigmoid_of_scaled in common/activations.h
                gamma *= Vector<T>(T(minus_log2_e));
                beta *= Vector<T>(T(minus_log2_e));
            }
            if (call.z_bias != nullptr) z_bias = read_as<T>(call.z_bias_dtype, call.z_bias, k * D + d, count);
            gamma.store_aligned(at);
            beta.store_aligned(at + gates * W);
            z_bias.store_aligned(at + 2 * gates * W);
        }
    }
}

void pack(const GatesCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

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
            part.store(c_out + d, c, stream);
            part.store(h_out + d, h, stream);
        });
    }
#if defined(__x86_64__)
    if (call.stream) _mm_sfence();
#endif
}

// dz of a row from u = gamma da and n, given their sums over the blocks. The sums of dz for z_bias go to `partial`, if
// there is one. Not inlined, as stage_row.
template <class MZ, int K>
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
            part.store(dz + k * D + block * W, v, call.stream);
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
            part.store(dc_in + d, gradient.dc_in, stream);
            V da[K];
            da[0] = gradient.da_i, da[1] = gradient.da_f, da[2] = gradient.da_o;
            if constexpr (given) {
                part.store(dhidden + d, gradient.dg * keep, stream);
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

        finish_row<MZ, K>(call, row, of_row, sum_u, sum_un, normalised, u_row, z_bias_gradient ? partial : nullptr);
    }
#if defined(__x86_64__)
    if (call.stream) _mm_sfence();
#endif
}

template <class T>
void reduce_as(const GatesCall& call, const T* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    const int gates = gate_count(call);
    const int64_t D = call.features;
    const int64_t stride = partial_bytes(call) / int64_t(sizeof(T));
    for (int64_t block = block_begin; block < block_end; ++block) {
        for (int j = 0; j < 3 * gates; ++j) {
            void* out = j < gates ? call.dweight : j < 2 * gates ? call.dbias : call.dz_bias;
            if (out == nullptr) continue;
            Vector<T> sum(T(0));
            for (int64_t p = 0; p < count; ++p)
                sum += Vector<T>::load_aligned(partials + p * stride + (block * 3 * gates + j) * width<T>);
            const int64_t d = block * width<T>;
            const DType dtype = j < 2 * gates ? call.affine_dtype : call.z_bias_dtype;
            write_as<T>(dtype, out, (j % gates) * D + d, sum, D - d < width<T> ? D - d : width<T>);
        }
    }
}

void reduce(const GatesCall& call, const void* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count, block_begin, block_end);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count, block_begin, block_end);
    }
}

template <class MZ, class MC, bool fast, class Visitor>
void with_activation(const GatesCall& call, Visitor visit) {
// Under the sanitizers all seven take minutes to compile. They differ in their formulas only, so one stands for all.
#if defined(DEPTHLSTM_SANITIZED)
    if (call.activation == Activation::given) return visit.template operator()<MZ, MC, Given, fast>();
    return visit.template operator()<MZ, MC, Gelu, fast>();
#else
    switch (call.activation) {
#define DEPTHLSTM_CASE(name, functions) \
    case Activation::name: return visit.template operator()<MZ, MC, functions, fast>();
        DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_CASE)
#undef DEPTHLSTM_CASE
        case Activation::given: return visit.template operator()<MZ, MC, Given, fast>();
    }
    __builtin_trap();  // an unknown activation code: unwritten outputs must not be taken for results
#endif
}

// The fast formulas are for calls that round every result to 16 bits. One float32 operand asks for float32 results.
template <class M, class Visitor>
void with_half(const GatesCall& call, Visitor visit) {
    const bool wide_affine = call.weight != nullptr && call.affine_dtype == DType::float32;
    const bool wide_z_bias = call.z_bias != nullptr && call.z_bias_dtype == DType::float32;
    if (call.c_dtype == DType::float32) return with_activation<M, float, false>(call, visit);
    if (wide_affine || wide_z_bias) return with_activation<M, M, false>(call, visit);
    return with_activation<M, M, true>(call, visit);
}

// avx512_bf16 differs from avx512 in its stores of bfloat16. It has kernels for z of that type and passes every other
// call on.
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
bool is_of_avx512(const GatesCall& call) { return call.z_dtype != DType::bfloat16; }
template <class Visitor>
void with_types(const GatesCall& call, Visitor visit) {
    with_half<BFloat16>(call, visit);
}
#else
template <class Visitor>
void with_types(const GatesCall& call, Visitor visit) {
    switch (call.z_dtype) {
        case DType::float32: return with_activation<float, float, false>(call, visit);
        case DType::float64: return with_activation<double, double, false>(call, visit);
        case DType::bfloat16: return with_half<BFloat16>(call, visit);
        case DType::float16: return with_half<Float16>(call, visit);
    }
}
#endif

void forward(const GatesCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gates_kernels.forward(call, packed, scratch, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MC, class Act, bool fast>() {
        forward_rows<MZ, MC, Act, fast>(call, packed, scratch, row_begin, row_end);
    });
}

void backward(const GatesCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gates_kernels.backward(call, packed, scratch, partial, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MC, class Act, bool fast>() {
        backward_rows<MZ, MC, Act, fast>(call, packed, scratch, partial, row_begin, row_end);
    });
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const GatesKernels gates_kernels{DEPTHLSTM_NAME(DEPTHLSTM_ISA),
                                 packed_bytes,
                                 scratch_bytes,
                                 partial_bytes,
                                 feature_blocks,
                                 pack,
                                 forward,
                                 backward,
                                 reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
