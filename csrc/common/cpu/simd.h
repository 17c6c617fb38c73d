// Vectors of float or double for the instruction set of this compilation: xsimd's arithmetic with conversions of its
// own.
#pragma once

#include <cstring>
#include <xsimd/xsimd.hpp>

#include "common/activations.h"

// Everything here differs between instruction sets, so it lives in the namespace of one.
namespace depthlstm::DEPTHLSTM_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class T>
using Vector = xsimd::batch<T, xsimd::default_arch>;

// Half formats are read into fp32; everything else is computed in its own type.
template <class T>
struct ComputeType {
    using type = float;
};
template <>
struct ComputeType<double> {
    using type = double;
};

inline __attribute__((always_inline)) float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline __attribute__((always_inline)) uint16_t float_to_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return uint16_t((wide >> 16) | 0x40u);  // NaN stays NaN
    return uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

#if !defined(__F16C__)
inline __attribute__((always_inline)) float float16_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t wide;
    float value;
    if (magnitude >= 0x7c00u) {
        wide = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    // the multiplication rebases the exponent, which is right for subnormals too
    wide = magnitude << 13;
    std::memcpy(&value, &wide, 4);
    value *= 5.192296858534828e33f;  // 2^112
    return sign ? -value : value;
}

inline __attribute__((always_inline)) uint16_t float_to_float16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t sign = (wide >> 16) & 0x8000u;
    const uint32_t magnitude = wide & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past 65504
    if (magnitude < 0x38800000u) {                                  // subnormal: the addition of 1/2 rounds
        float small;
        std::memcpy(&small, &magnitude, 4);
        small += 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &small, 4);
        return uint16_t(sign | (rounded - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return uint16_t(sign | (rounded >> 13));
}
#endif

// One vector from or to memory of type T, without alignment.
template <class T>
struct Memory {
    static inline __attribute__((always_inline)) Vector<T> load(const T* p) { return Vector<T>::load_unaligned(p); }
    template <bool = false>
    static inline __attribute__((always_inline)) void store(T* p, Vector<T> v) {
        v.store_unaligned(p);
    }
    template <bool = false>
    static inline __attribute__((always_inline)) void stream(T* p, Vector<T> v) {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            _mm512_stream_ps(p, v);
        } else {
            _mm512_stream_pd(p, v);
        }
#else
        v.store_aligned(p);
#endif
    }
};

template <>
struct Memory<BFloat16> {
    using V = Vector<float>;
    static inline __attribute__((always_inline)) V load(const BFloat16* p) {
#if defined(__AVX512F__)
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
        alignas(64) float wide[V::size];
        for (std::size_t lane = 0; lane < V::size; ++lane) wide[lane] = bfloat16_to_float(p[lane].bits);
        return V::load_aligned(wide);
#endif
    }
#if defined(__AVX512F__)
    template <bool narrow_nan>
    static inline __attribute__((always_inline)) __m256i round(V v) {
#if defined(__AVX512BF16__)
        return (__m256i)_mm512_cvtneps_pbh(v);  // one instruction instead of ten; fp32 subnormals become zero
#else
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        if constexpr (!narrow_nan) {
            const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        }
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
    }
#endif
    // narrow_nan: every operand is bfloat16, so that a NaN's lower 16 bits are zero and rounding leaves it a NaN. An
    // fp32 NaN of all ones would be rounded to -0. Forward, avx2, D=512, in cache: 3 % faster without the test.
    template <bool narrow_nan = false>
    static inline __attribute__((always_inline)) void store(BFloat16* p, V v) {
#if defined(__AVX512F__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round<narrow_nan>(v));
#elif defined(__AVX2__)
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        if constexpr (!narrow_nan) {
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
            rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
        }
        rounded = _mm256_srli_epi32(rounded, 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
        alignas(64) float wide[V::size];
        v.store_aligned(wide);
        for (std::size_t lane = 0; lane < V::size; ++lane) p[lane].bits = float_to_bfloat16(wide[lane]);
#endif
    }
    template <bool narrow_nan = false>
    static inline __attribute__((always_inline)) void stream(BFloat16* p, V v) {
#if defined(__AVX512F__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round<narrow_nan>(v));
#else
        store<narrow_nan>(p, v);
#endif
    }
};

template <>
struct Memory<Float16> {
    using V = Vector<float>;
    static inline __attribute__((always_inline)) V load(const Float16* p) {
#if defined(__AVX512F__)
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        alignas(64) float wide[V::size];
        for (std::size_t lane = 0; lane < V::size; ++lane) wide[lane] = float16_to_float(p[lane].bits);
        return V::load_aligned(wide);
#endif
    }
    template <bool = false>
    static inline __attribute__((always_inline)) void store(Float16* p, V v) {
#if defined(__AVX512F__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
        alignas(64) float wide[V::size];
        v.store_aligned(wide);
        for (std::size_t lane = 0; lane < V::size; ++lane) p[lane].bits = float_to_float16(wide[lane]);
#endif
    }
    template <bool = false>
    static inline __attribute__((always_inline)) void stream(Float16* p, V v) {
#if defined(__AVX512F__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
        store(p, v);
#endif
    }
};

// The first `count` lanes. The other lanes are read as zero and never written.
template <class T>
__attribute__((noinline)) static Vector<typename ComputeType<T>::type> load_part(const T* p, int64_t count) {
    alignas(64) T whole[Vector<typename ComputeType<T>::type>::size] = {};
    std::memcpy(whole, p, std::size_t(count) * sizeof(T));
    return Memory<T>::load(whole);
}

template <class T>
__attribute__((noinline)) static void store_part(T* p, Vector<typename ComputeType<T>::type> v, int64_t count) {
    alignas(64) T whole[Vector<typename ComputeType<T>::type>::size];
    Memory<T>::store(whole, v);
    std::memcpy(p, whole, std::size_t(count) * sizeof(T));
}

}  // namespace depthlstm::DEPTHLSTM_ISA

namespace depthlstm {

// 2^x from its two parts, and 1 / x for x >= 1, for one vector or a group of vectors.
template <bool fast, class V>
DEPTHLSTM_HD V exp2_of(V x) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
    if constexpr (sizeof(T) == 8) {
        return P::library_exp2(x);
    } else {
        const V r = P::fraction(x);
        V p;  // 2^r for 0 <= r <= 1: 7.5e-8, or 7.5e-5 when fast
        if constexpr (fast) {
            p = P::fma(r, V(T(0.0780245219)), V(T(0.22606716)));
            p = P::fma(r, p, V(T(0.695833541)));
            p = P::fma(r, p, V(T(0.999925219)));
        } else {
            p = P::fma(r, V(T(0.00187757667)), V(T(0.00898934009)));
            p = P::fma(r, p, V(T(0.0558263181)));
            p = P::fma(r, p, V(T(0.240153617)));
            p = P::fma(r, p, V(T(0.693153073)));
            p = P::fma(r, p, V(T(0.999999925)));
        }
        return P::scale(p, x);
    }
}

template <bool fast, class V>
DEPTHLSTM_HD V reciprocal_of(V x) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        // a division would take the pipe that the multiplications need
        if constexpr (fast) return P::approximate_reciprocal(x);
        const V y = P::minimum(x, V(T(4e37)));  // keeps 1 / y from being subnormal, makes infinity finite, keeps NaN
        const V r = P::approximate_reciprocal(y);
        return P::fma(r, P::fnma(y, r, V(T(1))), r);
    }
#endif
    return V(T(1)) / x;
}

template <class T, class A>
struct Primitives<xsimd::batch<T, A>> {
    using Scalar = T;
    using V = xsimd::batch<T, A>;
    static DEPTHLSTM_HD V fma(V a, V b, V c) { return xsimd::fma(a, b, c); }
    static DEPTHLSTM_HD V fnma(V a, V b, V c) { return xsimd::fnma(a, b, c); }
    static DEPTHLSTM_HD V abs(V x) { return xsimd::abs(x); }
    static DEPTHLSTM_HD V erfc(V x) { return xsimd::erfc(x); }
    // xsimd's min and max return their first operand on NaN, as std's do, so that NaN passes
    static DEPTHLSTM_HD V minimum(V x, V high) { return xsimd::min(x, high); }
    static DEPTHLSTM_HD V clamp(V x, V low, V high) { return xsimd::min(xsimd::max(x, low), high); }
    static DEPTHLSTM_HD V select_negative(V x, V yes, V no) { return xsimd::select(x < V(T(0)), yes, no); }
    static DEPTHLSTM_HD V library_exp2(V x) { return xsimd::exp2(clamp(x, V(T(-1021)), V(T(1021)))); }
    template <bool fast>
    static DEPTHLSTM_HD V reciprocal(V x) {
        return reciprocal_of<fast>(x);
    }
    template <bool fast>
    static DEPTHLSTM_HD V exp2(V x) {
        return exp2_of<fast>(x);
    }
#if defined(__AVX512F__)
    static DEPTHLSTM_HD V approximate_reciprocal(V x) { return _mm512_rcp14_ps(x); }  // 6e-5
    // x - floor(x), which is 0 for +-infinity. scalef takes the floor of its second operand itself, and saturates.
    static DEPTHLSTM_HD V fraction(V x) { return _mm512_reduce_ps(x, 9); }
    static DEPTHLSTM_HD V scale(V p, V x) { return _mm512_scalef_ps(p, x); }
#else
    static DEPTHLSTM_HD V bounded(V x) { return clamp(x, V(T(-126)), V(T(126))); }
    static DEPTHLSTM_HD V fraction(V x) {
        const V y = bounded(x);
        return y - xsimd::floor(y);
    }
    static DEPTHLSTM_HD V scale(V p, V x) { return xsimd::ldexp(p, xsimd::to_int(xsimd::floor(bounded(x)))); }
#endif
};

// Several vectors that take each step of a formula together, so that their dependency chains overlap in the processor's
// window. The window does not reach from the end of one sigmoid to the start of the next.
template <class Vector, int n>
struct Group {
    Vector v[n];
    Group() = default;
    explicit DEPTHLSTM_HD Group(typename Primitives<Vector>::Scalar x) {
        for (int i = 0; i < n; ++i) v[i] = Vector(x);
    }
};

#define DEPTHLSTM_EACH(expression)                     \
    Group<V, n> out;                                   \
    for (int i = 0; i < n; ++i) out.v[i] = expression; \
    return out

template <class V, int n>
DEPTHLSTM_HD Group<V, n> operator+(Group<V, n> a, Group<V, n> b) {
    DEPTHLSTM_EACH(a.v[i] + b.v[i]);
}
template <class V, int n>
DEPTHLSTM_HD Group<V, n> operator*(Group<V, n> a, Group<V, n> b) {
    DEPTHLSTM_EACH(a.v[i] * b.v[i]);
}
template <class V, int n>
DEPTHLSTM_HD Group<V, n> operator/(Group<V, n> a, Group<V, n> b) {
    DEPTHLSTM_EACH(a.v[i] / b.v[i]);
}

template <class V, int n>
struct Primitives<Group<V, n>> {
    using G = Group<V, n>;
    using P = Primitives<V>;
    using Scalar = typename P::Scalar;
    static DEPTHLSTM_HD G fma(G a, G b, G c) { DEPTHLSTM_EACH(P::fma(a.v[i], b.v[i], c.v[i])); }
    static DEPTHLSTM_HD G fnma(G a, G b, G c) { DEPTHLSTM_EACH(P::fnma(a.v[i], b.v[i], c.v[i])); }
    static DEPTHLSTM_HD G minimum(G x, G high) { DEPTHLSTM_EACH(P::minimum(x.v[i], high.v[i])); }
    static DEPTHLSTM_HD G approximate_reciprocal(G x) { DEPTHLSTM_EACH(P::approximate_reciprocal(x.v[i])); }
    static DEPTHLSTM_HD G fraction(G x) { DEPTHLSTM_EACH(P::fraction(x.v[i])); }
    static DEPTHLSTM_HD G scale(G p, G x) { DEPTHLSTM_EACH(P::scale(p.v[i], x.v[i])); }
    static DEPTHLSTM_HD G library_exp2(G x) { DEPTHLSTM_EACH(P::library_exp2(x.v[i])); }
    template <bool fast>
    static DEPTHLSTM_HD G reciprocal(G x) {
        return reciprocal_of<fast>(x);
    }
    template <bool fast>
    static DEPTHLSTM_HD G exp2(G x) {
        return exp2_of<fast>(x);
    }
};
#undef DEPTHLSTM_EACH

}  // namespace depthlstm
