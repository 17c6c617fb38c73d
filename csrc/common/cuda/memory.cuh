// Rows in a GPU's memory: 16-byte accesses to W features of a thread, conversion to fp32, small parameters.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "primitives.cuh"

namespace depthlstm {

template <class T>
__device__ __forceinline__ const T* row_of(const ConstRows& rows, int64_t row) {
    return static_cast<const T*>(rows.data) + row * rows.stride;
}
template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t row) {
    return static_cast<T*>(rows.data) + row * rows.stride;
}

// W consecutive elements as they lie in memory. Loads are issued as Raw and converted later, so that no load waits for
// another.
template <class T, int W>
struct Raw {
    static constexpr int words = W * int(sizeof(T)) / 16;
    static_assert(words * 16 == W * int(sizeof(T)));
    uint4 word[words];
};

// A tensor's row is read once. It is marked to leave the caches first, so that parameters, which every row needs, stay.
enum class Reading { once, often };

template <int W, Reading reading = Reading::once, class T>
__device__ __forceinline__ Raw<T, W> load_raw(const T* at) {
    Raw<T, W> raw;
#pragma unroll
    for (int i = 0; i < Raw<T, W>::words; ++i) {
        const uint4* word = reinterpret_cast<const uint4*>(at) + i;
        raw.word[i] = reading == Reading::once ? __ldcs(word) : __ldg(word);
    }
    return raw;
}

// Brings data for later loads into L2.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&bits));
    }
}

template <class T, int W>
__device__ __forceinline__ void convert(const Raw<T, W>& raw, float (&values)[W]) {
#pragma unroll
    for (int i = 0; i < Raw<T, W>::words; ++i) {
        const uint32_t bits[4] = {raw.word[i].x, raw.word[i].y, raw.word[i].z, raw.word[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (sizeof(T) == 4) {
                values[4 * i + j] = __uint_as_float(bits[j]);
            } else {
                const float2 pair = unpack<T>(bits[j]);
                values[8 * i + 2 * j] = pair.x;
                values[8 * i + 2 * j + 1] = pair.y;
            }
        }
    }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

template <int W, class T>
__device__ __forceinline__ void store(T* at, const float (&values)[W]) {
#pragma unroll
    for (int i = 0; i < Raw<T, W>::words; ++i) {
        uint4 word;
        if constexpr (sizeof(T) == 4) {
            const float* v = values + 4 * i;
            word = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
        } else {
            const float* v = values + 8 * i;
            word = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
        }
        reinterpret_cast<uint4*>(at)[i] = word;
    }
}

// A small parameter (K, D), in fp32 or in z's dtype. Every row reads it, and it stays in L1.
template <class Z>
struct Parameter {
    const void* data;
    bool is_float;

    __device__ __forceinline__ float at(int64_t index, float absent) const {
        if (data == nullptr) return absent;
        return is_float ? static_cast<const float*>(data)[index] : to_float(static_cast<const Z*>(data)[index]);
    }
};

// Calls `body` with the parameters' typed elements, if there are any. One branch covers all loads in `body`, so that
// none of them waits.
template <class Z, class Body>
__device__ __forceinline__ void with_type(const Parameter<Z>& parameter, const Body& body) {
    if (parameter.data == nullptr) return;
    if constexpr (sizeof(Z) == 2) {
        if (!parameter.is_float) return body(static_cast<const Z*>(parameter.data));
    }
    body(static_cast<const float*>(parameter.data));
}

}  // namespace depthlstm
