// The activations and their list, once for scalars and SIMD vectors, host and device.
//
// V is a floating-point value or vector. Primitives<V> supplies the operations that differ:
//     Scalar, fma(a, b, c), exp2<fast>(x), reciprocal<fast>(x) for x >= 1, clamp(x, low, high),
//     select_negative(x, yes, no), abs(x), erfc(x)
// NaN must pass through every primitive. `fast` is for 16-bit results: its errors are about 5e-5, a tenth of an fp16
// rounding. The polynomial coefficients are weighted minimax fits made for this file. Each has its largest error beside
// it.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

namespace depthlstm {

template <class V>
struct Primitives;

template <class T>
struct ScalarPrimitives {
    using Scalar = T;
    static DEPTHLSTM_HD T fma(T a, T b, T c) { return ::fma(a, b, c); }
    template <bool fast>
    static DEPTHLSTM_HD T exp2(T x) {
        return ::exp2(x);
    }
    template <bool fast>
    static DEPTHLSTM_HD T reciprocal(T x) {
        return T(1) / x;
    }
    static DEPTHLSTM_HD T clamp(T x, T low, T high) { return x < low ? low : (x > high ? high : x); }
    static DEPTHLSTM_HD T select_negative(T x, T yes, T no) { return x < T(0) ? yes : no; }
    static DEPTHLSTM_HD T abs(T x) { return ::fabs(x); }
    static DEPTHLSTM_HD T erfc(T x) { return ::erfc(x); }
};
#if !defined(__CUDACC__)  // cuda/primitives.cuh has its own
template <>
struct Primitives<float> : ScalarPrimitives<float> {};
#endif
template <>
struct Primitives<double> : ScalarPrimitives<double> {};

constexpr double minus_log2_e = -1.4426950408889634;

// sigmoid(a) from x = minus_log2_e * a. The forward pass scales its affine by that factor instead of scaling every a.
template <bool fast, class V>
DEPTHLSTM_HD V sigmoid_of_scaled(V x) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
    return P::template reciprocal<fast>(V(T(1)) + P::template exp2<fast>(x));
}

// 1 / (1 + e^-a)
template <bool fast, class V>
DEPTHLSTM_HD V sigmoid(V a) {
    return sigmoid_of_scaled<fast>(a * V(typename Primitives<V>::Scalar(minus_log2_e)));
}

// The standard normal distribution's cumulative function and density.
template <class V>
struct Normal {
    V cdf, pdf;
};

template <bool fast, class V>
DEPTHLSTM_HD Normal<V> normal(V a) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
    const V half_density = P::template exp2<fast>(a * a * V(T(-0.72134752044448170)));  // exp(-a^2 / 2)
    const V pdf = half_density * V(T(0.39894228040143268));
    if constexpr (sizeof(T) == 8) {
        return {V(T(0.5)) * P::erfc(a * V(T(-0.70710678118654752))), pdf};
    } else {
        // cdf(-|a|) = exp(-a^2 / 2) m(t). Mills' ratio is a polynomial in t, so the tail keeps its relative accuracy.
        V m, t;
        if constexpr (fast) {  // 1.5e-5
            t = P::template reciprocal<fast>(P::fma(P::abs(a), V(T(0.33)), V(T(1))));
            m = P::fma(t, V(T(0.386598391)), V(T(-0.0642068398)));
            m = P::fma(t, m, V(T(0.177593372)));
        } else {  // 9.3e-9
            t = P::template reciprocal<fast>(P::fma(P::abs(a), V(T(0.28)), V(T(1))));
            m = P::fma(t, V(T(-0.105807978)), V(T(0.389872949)));
            m = P::fma(t, m, V(T(-0.236991772)));
            m = P::fma(t, m, V(T(0.268908808)));
            m = P::fma(t, m, V(T(0.0674972889)));
            m = P::fma(t, m, V(T(0.116520695)));
        }
        const V tail = m * t * half_density;
        return {P::select_negative(a, tail, V(T(1)) - tail), pdf};
    }
}

// The standard normal distribution's cumulative function alone.
template <bool fast, class V>
DEPTHLSTM_HD V normal_cdf(V a) {
    using P = Primitives<V>;
    using T = typename P::Scalar;
    if constexpr (fast && sizeof(T) == 4) {  // 1/2 + a p(a^2) / q(a^2), 4.9e-5: half the work of the form above
        const V x = P::clamp(a, V(T(-4.4)), V(T(4.4)));
        const V s = x * x;
        V p = P::fma(s, V(T(-1.91085691e-05)), V(T(0.00213476805)));
        p = P::fma(s, p, V(T(0.0455299943)));
        p = P::fma(s, p, V(T(0.39873578)));
        V q = P::fma(s, V(T(0.0285111895)), V(T(0.279035214)));
        q = P::fma(s, q, V(T(1)));
        return P::fma(x * p, P::template reciprocal<fast>(q), V(T(0.5)));
    } else {
        return normal<fast>(a).cdf;
    }
}

struct Gelu {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        return a * normal_cdf<fast>(a);
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& value, V& slope) {
        const Normal<V> n = normal<fast>(a);
        value = a * n.cdf;
        slope = Primitives<V>::fma(a, n.pdf, n.cdf);
    }
};

// 0.5 a (1 + tanh u) = a sigmoid(2 u),  u = sqrt(2 / pi) (a + 0.044715 a^3)
struct GeluTanh {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        using T = typename Primitives<V>::Scalar;
        const V cubic = Primitives<V>::fma(a * a, V(T(0.071354816272600248)), V(T(1.5957691216057308)));
        return a * sigmoid<fast>(a * cubic);
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& value, V& slope) {
        using T = typename Primitives<V>::Scalar;
        const V square = a * a;
        const V s = sigmoid<fast>(a * Primitives<V>::fma(square, V(T(0.071354816272600248)), V(T(1.5957691216057308))));
        const V inner = Primitives<V>::fma(square, V(T(0.21406444881780074)), V(T(1.5957691216057308)));  // d 2u / d a
        value = a * s;
        slope = Primitives<V>::fma(value * (V(T(1)) - s), inner, s);
    }
};

struct Relu {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        return Primitives<V>::select_negative(a, V(typename Primitives<V>::Scalar(0)), a);
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& v, V& slope) {
        using T = typename Primitives<V>::Scalar;
        v = value<fast>(a);
        slope = Primitives<V>::select_negative(-a, V(T(1)), V(T(0)));  // 0 at a = 0, as torch
    }
};

struct Tanh {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        using T = typename Primitives<V>::Scalar;
        return Primitives<V>::fma(sigmoid<fast>(a + a), V(T(2)), V(T(-1)));
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& v, V& slope) {
        using T = typename Primitives<V>::Scalar;
        const V s = sigmoid<fast>(a + a);
        v = Primitives<V>::fma(s, V(T(2)), V(T(-1)));
        slope = V(T(4)) * s * (V(T(1)) - s);
    }
};

struct Silu {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        return a * sigmoid<fast>(a);
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& v, V& slope) {
        using T = typename Primitives<V>::Scalar;
        const V s = sigmoid<fast>(a);
        v = a * s;
        slope = Primitives<V>::fma(v, V(T(1)) - s, s);
    }
};

struct Sigmoid {
    template <bool fast, class V>
    static DEPTHLSTM_HD V value(V a) {
        return sigmoid<fast>(a);
    }
    template <bool fast, class V>
    static DEPTHLSTM_HD void value_and_slope(V a, V& v, V& slope) {
        using T = typename Primitives<V>::Scalar;
        v = sigmoid<fast>(a);
        slope = v * (V(T(1)) - v);
    }
};

// Every activation: its name, and its functions above. depthlstm_fast/activations.py has the same names in the same
// order.
#define DEPTHLSTM_ACTIVATIONS(X) \
    X(gelu, Gelu)                \
    X(gelu_tanh, GeluTanh)       \
    X(relu, Relu)                \
    X(tanh, Tanh)                \
    X(silu, Silu)                \
    X(sigmoid, Sigmoid)

#define DEPTHLSTM_ENUMERATOR(name, functions) name,
// `given`: the value is read from memory, not computed.
enum class Activation : int32_t { DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_ENUMERATOR) given };
#undef DEPTHLSTM_ENUMERATOR

#define DEPTHLSTM_WORD(name, functions) " " #name
constexpr const char activation_names[] = "" DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_WORD);
#undef DEPTHLSTM_WORD

}  // namespace depthlstm
