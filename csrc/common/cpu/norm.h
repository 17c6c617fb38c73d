// LayerNorm and RMSNorm of a row that lies in scratch, for the ops that join rows and normalise them.
//
// A row in scratch is stored by blocks of one vector, `stride` elements from block to block, so that all rows of a
// computation lie side by side: rows 2^n bytes apart would share cache sets. Lanes beyond the last feature may hold
// any finite number; the statistics leave them out, and packed parameters have zeros there.
#pragma once

#include <cmath>

#include "common/parameter.h"
#include "rows.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
int64_t blocks_of(int64_t features) {
    return (features + width<T> - 1) / width<T>;
}

// n = (v - mean) * r + shift. As it is made it stands for no norm: n = 0 and no gradient.
template <class T>
struct RowNorm {
    T mean = 0, r = 0, shift = 0;

    DEPTHLSTM_HD Vector<T> operator()(Vector<T> v) const {
        return xsimd::fma(v - Vector<T>(mean), Vector<T>(r), Vector<T>(shift));
    }
};

// The statistics of a row whose sum is known, in a second pass. The rounding error of the mean is most of a nearly
// constant row's rest, and 1 / sqrt(eps) would blow it up, so that this pass takes the mean of the rest too.
template <class T>
__attribute__((noinline)) RowNorm<T> row_norm(const T* row, int64_t stride, int64_t features, Vector<T> sum, bool rms,
                                              T eps) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const T mean = rms ? T(0) : xsimd::reduce_add(sum) / T(features);
    V square[4], rest[4];
    for (int i = 0; i < 4; ++i) square[i] = rest[i] = V(T(0));
    const auto add = [&](int i, V centred) __attribute__((always_inline)) {
        square[i] = xsimd::fma(centred, centred, square[i]);
        rest[i] += centred;
    };
    const int64_t whole = features / W;
    int64_t block = 0;
    for (; block + 4 <= whole; block += 4) {
        for (int i = 0; i < 4; ++i) add(i, V::load_aligned(row + (block + i) * stride) - V(mean));
    }
    for (; block < whole; ++block) add(0, V::load_aligned(row + block * stride) - V(mean));
    if (block * W < features) {
        const V centred = V::load_aligned(row + block * stride) - V(mean);
        add(1, xsimd::select(first_lanes<T>(features - block * W), centred, V(T(0))));
    }
    const T left = rms ? T(0) : xsimd::reduce_add((rest[0] + rest[1]) + (rest[2] + rest[3])) / T(features);
    const T variance = xsimd::reduce_add((square[0] + square[1]) + (square[2] + square[3])) / T(features) - left * left;
    const T r = T(1) / std::sqrt((variance < T(0) ? T(0) : variance) + eps);
    return {mean, r, -left * r};
}

// The gradient through a norm: r (q - mean(q) - n mean(q n)) with q = weight * gradient of the output. In this order a
// constant row's difference cancels before the factor r = 1 / sqrt(eps). As it is made it is 0 with r = 0.
template <class T>
struct RowGradient {
    T r = 0, mean_q = 0, mean_qn = 0;

    RowGradient() = default;
    DEPTHLSTM_HD RowGradient(const RowNorm<T>& norm, int64_t features, Vector<T> sum_q, Vector<T> sum_qn, bool rms)
        : r(norm.r),
          mean_q(rms ? T(0) : xsimd::reduce_add(sum_q) / T(features)),
          mean_qn(xsimd::reduce_add(sum_qn) / T(features)) {}

    DEPTHLSTM_HD Vector<T> operator()(Vector<T> q, Vector<T> n) const {
        return Vector<T>(r) * xsimd::fnma(n, Vector<T>(mean_qn), q - Vector<T>(mean_q));
    }
};

// A row of memory into scratch; returns its sum. The next row is fetched meanwhile.
template <class M>
__attribute__((noinline)) Vector<typename ComputeType<M>::type> stage(const M* from, const M* next,
                                                                      typename ComputeType<M>::type* row,
                                                                      int64_t stride, int64_t features) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V sum(T(0));
    for_blocks<W>(features, [&](auto part, int64_t block) __attribute__((always_inline)) {
        prefetch(next + block * W);
        const V v = part.load(from + block * W);
        v.store_aligned(row + block * stride);
        sum += v;
    });
    return sum;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// 16-bit vectors in a register, for vectors that are stored and used as they were rounded. The way through memory and
// the blend of Memory<BFloat16>::store cost more.
inline __attribute__((always_inline)) __m256i rounded_bits(Vector<float> v) {  // bf16 in the upper halves
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_or_si256(sum, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));  // NaN: all bits
}
template <class M>
inline __attribute__((always_inline)) __m128i narrowed(Vector<float> v) {
    if constexpr (std::is_same_v<M, BFloat16>) {
        const __m256i halves = _mm256_set_epi64x(-1, 0x0f0e0b0a07060302, -1, 0x0f0e0b0a07060302);
        const __m256i packed = _mm256_shuffle_epi8(rounded_bits(v), halves);
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    } else {
        return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
}
#endif

// A vector of a row of an output. Past the caches it needs an address that is a multiple of a vector's size.
template <class M, class Part, class V>
inline __attribute__((always_inline)) void store_out(Part part, M* p, V v, bool past_caches) {
    if constexpr (std::is_same_v<Part, Whole>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (sizeof(M) == 2) {
            const __m128i half = narrowed<M>(v);
            __m128i* at = reinterpret_cast<__m128i*>(p);
            return past_caches ? _mm_stream_si128(at, half) : _mm_storeu_si128(at, half);
        } else if (past_caches) {
            if constexpr (sizeof(M) == 8) {
                _mm256_stream_pd(p, v);
            } else {
                _mm256_stream_ps(p, v);
            }
            return;
        }
#else
        if (past_caches) return Memory<M>::stream(p, v);
#endif
    }
    part.store(p, v, false);
}

// v as memory of type M keeps it.
template <class M>
inline __attribute__((always_inline)) Vector<typename ComputeType<M>::type> rounded(
    Vector<typename ComputeType<M>::type> v) {
    if constexpr (sizeof(M) == sizeof(typename ComputeType<M>::type)) {
        return v;
    } else {
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (std::is_same_v<M, BFloat16>) {
            return _mm256_castsi256_ps(_mm256_and_si256(rounded_bits(v), _mm256_set1_epi32(int(0xffff0000u))));
        } else {
            return _mm256_cvtph_ps(narrowed<M>(v));
        }
#else
        alignas(64) M kept[width<typename ComputeType<M>::type>];
        Memory<M>::store(kept, v);
        return Memory<M>::load(kept);
#endif
    }
}

// The same, which also stores it.
template <class M, class Part, class V>
inline __attribute__((always_inline)) V store_rounded(Part part, M* p, V v, bool past_caches) {
    if constexpr (sizeof(M) == sizeof(typename ComputeType<M>::type)) {
        store_out(part, p, v, past_caches);
        return v;
    } else {
        store_out(part, p, v, past_caches);
#if defined(__AVX2__) && !defined(__AVX512F__)
        return rounded<M>(v);
#else
        return past_caches ? rounded<M>(v) : V(part.load(p));
#endif
    }
}

// Makes stores past the caches visible to other threads.
inline void finish_stores([[maybe_unused]] bool past_caches) {
#if defined(__x86_64__)
    if (past_caches) _mm_sfence();
#endif
}

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

// A parameter by features into its place of each block, with zeros beyond the last feature; zeros where it is absent.
template <class T>
void pack_parameter(const Parameter& parameter, int64_t features, T* packed, int64_t stride) {
    for (int64_t block = 0; block < blocks_of<T>(features); ++block) {
        const int64_t d = block * width<T>, count = features - d < width<T> ? features - d : width<T>;
        Vector<T> v(T(0));
        if (parameter.data != nullptr) v = read_as<T>(parameter.dtype, parameter.data, d, count);
        v.store_aligned(packed + block * stride);
    }
}

// Sums a parameter's partial sums, in their order, for a range of blocks.
template <class T>
void reduce_parameter(const Parameter& parameter, int64_t features, const T* partials, int64_t partial_elements,
                      int64_t count, int64_t stride, int64_t block_begin, int64_t block_end) {
    if (parameter.gradient == nullptr) return;
    for (int64_t block = block_begin; block < block_end; ++block) {
        Vector<T> sum(T(0));
        for (int64_t p = 0; p < count; ++p)
            sum += Vector<T>::load_aligned(partials + p * partial_elements + block * stride);
        const int64_t d = block * width<T>;
        write_as<T>(parameter.dtype, parameter.gradient, d, sum, features - d < width<T> ? features - d : width<T>);
    }
}

// The two places of a norm's partial sums.
template <class V, class T>
inline __attribute__((always_inline)) void add_affine(T* at, V gradient, V n) {
    xsimd::fma(gradient, n, V::load_aligned(at)).store_aligned(at);
    (V::load_aligned(at + width<T>) + gradient).store_aligned(at + width<T>);
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
