// What the gates kernels of the CPU and of CUDA take and give: plain pointers, no torch, no STL.
//
// A "row" is one token. The rows of every operand are `stride` elements apart and dense within.
// Source of the mathematics: Xu et al., arXiv 2007.06257; see depthlstm_fast/reference/gates.py for the same in PyTorch.
#pragma once

#include <cstdint>

namespace depthlstm {

enum class DType : int32_t { float32, float64, bfloat16, float16 };
enum class Norm : int32_t { gate, joint, none };
// `given`: g is read from `hidden` instead of being computed from z, and z holds three gates.
enum class Activation : int32_t { gelu, gelu_tanh, relu, tanh, silu, sigmoid, given };

struct ConstRows {
    const void* data = nullptr;
    int64_t stride = 0;
};

struct Rows {
    void* data = nullptr;
    int64_t stride = 0;
};

struct GatesCall {
    int64_t rows = 0;
    int64_t features = 0;                 // D
    DType z_dtype = DType::float32;       // of z, hidden, h, dh, dz, dhidden
    DType c_dtype = DType::float32;       // of every c and dc
    DType affine_dtype = DType::float32;  // of weight, bias and their gradients
    DType z_bias_dtype = DType::float32;  // of z_bias and its gradient
    Norm norm = Norm::gate;
    Activation activation = Activation::gelu;
    double eps = 1e-6;
    double dropout_p = 0;  // 0: no dropout
    uint64_t seed = 0;     // Philox key; on a GPU the key is in the GPU's memory, see cuda/gates.h
    bool stream = false;   // on the CPU: write the outputs past the caches; needs 64-byte aligned rows

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
