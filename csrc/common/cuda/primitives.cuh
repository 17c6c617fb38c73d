// The primitives that activations.h needs for a GPU's float, and the element types of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/activations.h"

namespace depthlstm {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// One instruction each for 2^x and 1/x. Subnormal numbers count as 0, which is an absolute error of 1e-38 in sigmoid.
template <>
struct Primitives<float> {
    using Scalar = float;
    static __device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
    template <bool fast>
    static __device__ __forceinline__ float exp2(float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    template <bool fast>
    static __device__ __forceinline__ float reciprocal(float x) {
        float y;
#if defined(DEPTHLSTM_Z_FLOAT)
        // One step of Newton's method. The instruction's own error of 1 ulp exceeds the bound of fp32 results in s (1 -
        // s). At infinity the step would turn 0 into NaN.
        asm("min.NaN.f32 %0, %0, 0f7E967699;" : "+f"(x));  // 1e38; NaN stays
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return __fmaf_rn(y, __fmaf_rn(-x, y, 1.f), y);
#else
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
#endif
    }
    static __device__ __forceinline__ float select_negative(float x, float yes, float no) { return x < 0.f ? yes : no; }
    static __device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
};

// Every operand here is computed in fp32 with the full polynomials. The short polynomials of 16-bit types would save
// only 4 of 85 instructions an element.
constexpr bool short_polynomials = false;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        return __float2bfloat16_rn(x);
    } else {
        return __float2half_rn(x);
    }
}

}  // namespace depthlstm
