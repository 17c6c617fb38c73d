// Code shared by the forward and backward kernels: the statistics of a row, the activations, dropout. K gates: 4, or 3
// with `hidden`.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/reduce.cuh"
#include "common/philox.h"
#include "cuda.h"
#include "math.h"

namespace depthlstm {

// Arguments of a kernel: the original call, and the launcher's additions.
struct Launch {
    GatesCall call;
    ConstRows z_more;
    const uint64_t* seed;
    float eps, dropout_scale;
    uint32_t dropout_threshold;  // an element is kept if its random word is at least this
    float* partial;              // (programs, sums of K D) fp32: the wanted ones of dweight, dbias, dz_bias
    float* statistics;           // (rows, 20) fp32: see cuda_backward_kernel.cu
};

// With at most this many rows for each multiprocessor a row gets its own block. The number is a guess, not measured.
constexpr int64_t few_rows = 4;

inline bool is_aligned_affine(const GatesCall& call) {
    return (reinterpret_cast<uintptr_t>(call.weight) | reinterpret_cast<uintptr_t>(call.bias) |
            reinterpret_cast<uintptr_t>(call.z_bias)) %
               16 ==
           0;
}

// a = n w + b in place for W features from `column` on; without an affine a = n. The result is multiplied by scale[k].
template <int K, int W, class Z>
__device__ __forceinline__ void apply_affine(float (&a)[4][W], const GatesCall& call, int column,
                                             const float (&scale)[4]) {
    const Parameter<Z> weight{call.weight, call.affine_dtype == DType::float32};
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < W; ++j) a[k][j] *= scale[k];
    }
    with_type(weight, [&](auto* weights) {
        const auto* biases = static_cast<decltype(weights)>(call.bias);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int64_t index = k * call.features + column;
            float w[W], b[W];
            convert(load_raw<W, Reading::often>(weights + index), w);
            convert(load_raw<W, Reading::often>(biases + index), b);
#pragma unroll
            for (int j = 0; j < W; ++j) a[k][j] = fmaf(a[k][j], w[j], b[j] * scale[k]);
        }
    });
}

// x *= weight for W features from `column` on, which are the elements of x from `first` on.
template <int K, int W, int E, class Z>
__device__ __forceinline__ void multiply_by_weight(float (&x)[K][E], const GatesCall& call, int column, int first) {
    with_type(Parameter<Z>{call.weight, call.affine_dtype == DType::float32}, [&](auto* weights) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float w[W];
            convert(load_raw<W, Reading::often>(weights + k * call.features + column), w);
#pragma unroll
            for (int j = 0; j < W; ++j) x[k][first + j] *= w[j];
        }
    });
}

// z += z_bias for W features from `column` on, which are the elements of z from `first` on.
template <int K, int W, int E, class Z>
__device__ __forceinline__ void add_z_bias(float (&z)[K][E], const GatesCall& call, int column, int first) {
    with_type(Parameter<Z>{call.z_bias, call.z_bias_dtype == DType::float32}, [&](auto* biases) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float b[W];
            convert(load_raw<W, Reading::often>(biases + k * call.features + column), b);
#pragma unroll
            for (int j = 0; j < W; ++j) z[k][first + j] += b[j];
        }
    });
}

// Division by a number that is used again. It nearly always rounds correctly, so that a constant row's mean is its
// value.
struct Division {
    float divisor, inverse;

    __device__ __forceinline__ explicit Division(float divisor) : divisor(divisor), inverse(1.f / divisor) {}
    __device__ __forceinline__ float operator()(float x) const {
        const float quotient = x * inverse;
        return fmaf(fmaf(-quotient, divisor, x), inverse, quotient);
    }
};

// A row's means over the D of each gate, or over all K D if joint. They come from the threads' sums in groups of four,
// of which K are in use.
template <int K, int N, class Row>
__device__ __forceinline__ void row_means(float (&v)[N], int number, const GatesCall& call, const Row& row) {
    const bool joint = call.norm == Norm::joint;
    const Division mean(float(call.features) * (joint ? float(K) : 1.f));
    row.sum(v, number, [&](float sum) { return joint ? sum : mean(sum); });
    if (!joint) return;
#pragma unroll
    for (int first = 0; first < N; first += 4) {
        float all = 0.f;
#pragma unroll
        for (int k = 0; k < K; ++k) all += v[first + k];
        all = mean(all);
#pragma unroll
        for (int k = 0; k < K; ++k) v[first + k] = all;
    }
}

// n = (z - mean) r + shift, from `rest`, the means of z - mean and of its square. The shift takes out the rounding
// error of the mean. On a nearly constant row this error is most of z - mean, and r = 1 / sqrt(eps) would blow it up.
template <int K>
__device__ __forceinline__ void scale_and_shift(const float (&rest)[8], float eps, float (&r)[K], float (&shift)[K]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        float variance = rest[4 + k] - rest[k] * rest[k];
        variance = variance < 0.f ? 0.f : variance;  // not a maximum, because NaN must stay
        r[k] = rsqrtf(variance + eps);
        shift[k] = -rest[k] * r[k];
    }
}

// z becomes n in place, with 0 in vectors that are not `inside`. The statistics take two passes over registers and use
// sums number 0 and 1.
template <int K, int V, int W, class Row>
__device__ __forceinline__ void normalise(float (&z)[K][V * W], const bool (&inside)[V], const Launch& launch,
                                          const Row& row, float (&r)[K]) {
    if (launch.call.norm == Norm::none) {
#pragma unroll
        for (int k = 0; k < K; ++k) r[k] = 1.f;
        return;
    }
    float mean[4] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < V * W; ++j) mean[k] += z[k][j];
    }
    row_means<K>(mean, 0, launch.call, row);
    float rest[8] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!inside[v]) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int j = v * W; j < (v + 1) * W; ++j) {
                z[k][j] -= mean[k];
                rest[k] += z[k][j];
                rest[4 + k] += z[k][j] * z[k][j];
            }
        }
    }
    row_means<K>(rest, 1, launch.call, row);
    float shift[K];
    scale_and_shift<K>(rest, launch.eps, r, shift);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (!inside[v]) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
            for (int j = v * W; j < (v + 1) * W; ++j) z[k][j] = z[k][j] * r[k] + shift[k];
        }
    }
}

// The statistics of a row of any length in two passes over memory. A thread gets its z by `z_at(gate, column)`, in
// columns blockDim.x apart.
template <int K, class ZAt, class Row>
__device__ __forceinline__ void statistics(const Launch& launch, const ZAt& z_at, const Row& row, float (&mean)[4],
                                           float (&r)[K], float (&shift)[K]) {
    if (launch.call.norm == Norm::none) {
#pragma unroll
        for (int k = 0; k < K; ++k) mean[k] = 0.f, r[k] = 1.f, shift[k] = 0.f;
        return;
    }
    const int features = int(launch.call.features);
#pragma unroll
    for (int k = 0; k < 4; ++k) mean[k] = 0.f;
    for (int column = threadIdx.x; column < features; column += blockDim.x) {
#pragma unroll
        for (int k = 0; k < K; ++k) mean[k] += z_at(k, column);
    }
    row_means<K>(mean, 0, launch.call, row);
    float rest[8] = {};
    for (int column = threadIdx.x; column < features; column += blockDim.x) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float centred = z_at(k, column) - mean[k];
            rest[k] += centred;
            rest[4 + k] += centred * centred;
        }
    }
    row_means<K>(rest, 1, launch.call, row);
    scale_and_shift<K>(rest, launch.eps, r, shift);
}

template <class A, int W>
__device__ __forceinline__ void apply(float (&a)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) a[j] = A::template value<short_polynomials>(a[j]);
}

template <class A, int W>
__device__ __forceinline__ void apply(float (&a)[W], float (&slope)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
        const float x = a[j];
        A::template value_and_slope<short_polynomials>(x, a[j], slope[j]);
    }
}

// g = act(a) in place; a second array receives the slopes. One branch serves W elements, because all threads have the
// same activation.
// There is no default case: cuda_launch.cu refuses other codes. A trap here cost backward a sixth more instructions and
// 8 registers.
template <class... Arrays>
__device__ __forceinline__ void activate(Activation activation, Arrays&... arrays) {
    switch (activation) {
#define DEPTHLSTM_CASE(name, functions) \
    case Activation::name: return apply<functions>(arrays...);
        DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_CASE)
#undef DEPTHLSTM_CASE
        case Activation::given: return;
    }
}

// Factors of g for the features first .. first + W - 1 of a row; first is a multiple of 4.
template <int W>
__device__ __forceinline__ void dropout_factors(const Launch& launch, uint64_t seed, int64_t row, int first,
                                                float (&factors)[W]) {
#pragma unroll
    for (int j = 0; j < W; j += 4) {
        uint32_t words[4];
        philox(seed, uint64_t(row), uint32_t(first + j) / 4, words);
#pragma unroll
        for (int i = 0; i < 4; ++i) factors[j + i] = words[i] >= launch.dropout_threshold ? launch.dropout_scale : 0.f;
    }
}
__device__ __forceinline__ float dropout_factor(const Launch& launch, uint64_t seed, int64_t row, int column) {
    uint32_t words[4];
    philox(seed, uint64_t(row), uint32_t(column) / 4, words);
    const uint32_t low = column & 1 ? words[1] : words[0],
                   high = column & 1 ? words[3] : words[2];  // an index would need local memory
    return (column & 2 ? high : low) >= launch.dropout_threshold ? launch.dropout_scale : 0.f;
}

}  // namespace depthlstm
