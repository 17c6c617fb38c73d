// Element types and rows in memory: plain pointers, no torch, no STL.
//
// The rows of a tensor are `stride` elements apart and dense within.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DEPTHLSTM_HD __host__ __device__ __forceinline__
#else
#define DEPTHLSTM_HD inline __attribute__((always_inline))
#endif

namespace depthlstm {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

struct ConstRows {
    const void* data = nullptr;
    int64_t stride = 0;
};

struct Rows {
    void* data = nullptr;
    int64_t stride = 0;
};

}  // namespace depthlstm
