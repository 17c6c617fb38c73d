// Arguments of the CPU and CUDA gates kernels: plain pointers, no torch, no STL. A row is one token.
//
// Source of the mathematics: Xu et al., arXiv 2007.06257. depthlstm_fast/reference/depth_lstm.py has the same in
// PyTorch.
#pragma once

#include "common/activations.h"

namespace depthlstm {

enum class Norm : int32_t { gate, joint, none };

struct GatesCall {
    int64_t rows = 0;
    int64_t features = 0;                 // D
    DType z_dtype = DType::float32;       // of z, hidden, h, dh, dz, dhidden
    DType c_dtype = DType::float32;       // of every c and dc
    DType affine_dtype = DType::float32;  // of weight, bias and their gradients
    DType z_bias_dtype = DType::float32;  // of z_bias and its gradient
    Norm norm = Norm::gate;
    Activation activation = Activation::gelu;  // given: g is read from `hidden`, and z holds three gates
    double eps = 1e-6;
    double dropout_p = 0;  // 0: no dropout
    uint64_t seed = 0;     // Philox key; on a GPU the key is in the GPU's memory, see cuda.h
    bool stream = false;   // CPU only: write the outputs past the caches; needs 64-byte aligned rows

    ConstRows z, hidden, c;        // (rows, K D), (rows, D), (rows, D); K gates: 4, or 3 with hidden
    const void* z_bias = nullptr;  // (K D) added to z, or null
    const void* weight = nullptr;  // (K, D) or null
    const void* bias = nullptr;    // (K, D) or null

    Rows h, c_out;  // forward: (rows, D) both

    ConstRows dh, dc;         // backward: (rows, D); a stride of 0 is fine
    Rows dz, dhidden, dc_in;  // (rows, K D), (rows, D), (rows, D)
    void* dweight = nullptr;  // (K, D) or null
    void* dbias = nullptr;    // (K, D) or null
    void* dz_bias = nullptr;  // (K D) or null
};

}  // namespace depthlstm
