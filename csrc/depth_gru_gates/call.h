// Arguments of the CPU kernels of the depth-wise GRU: plain pointers, no torch, no STL. A row is one token.
//
// depthlstm_fast/reference/depth_gru.py has the mathematics in PyTorch, with its sources.
#pragma once

#include "common/types.h"

namespace depthlstm {

constexpr int gru_gates = 4;  // reset, update, new, and the state's part of new

struct GruCall {
    int64_t rows = 0;
    int64_t features = 0;            // C
    DType z_dtype = DType::float32;  // of z and dz
    DType h_dtype = DType::float32;  // of h, h_out, dh_out and dh
    DType weight_dtype = DType::float32, bias_dtype = DType::float32;
    double eps = 1e-6;
    bool stream = false;  // write the outputs past the caches; needs 64-byte aligned rows

    ConstRows z, h;                // (rows, 4 C), (rows, C)
    const void* weight = nullptr;  // (4, C), the affine of a LayerNorm on each gate; null for no LayerNorm
    const void* bias = nullptr;    // (4, C), there if the weight is

    Rows h_out;  // forward: (rows, C)

    ConstRows dh_out;         // backward: (rows, C); a stride of 0 is fine
    Rows dz, dh;              // (rows, 4 C), (rows, C)
    void* dweight = nullptr;  // (4, C) or null
    void* dbias = nullptr;    // (4, C), there if dweight is
};

}  // namespace depthlstm
