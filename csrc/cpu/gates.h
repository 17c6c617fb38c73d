// What the CPU gates kernels take and give: plain pointers, no torch, no STL.
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
    uint64_t seed = 0;     // Philox key
    bool stream = false;   // write the outputs past the caches; needs 64-byte aligned rows

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

// One instruction set's kernels. Memory is the caller's, 64-byte aligned:
// `packed` once a call, `scratch` once a thread, `partial` (zeroed by the kernel) once a chunk of rows.
struct GatesKernels {
    const char* isa;
    int64_t (*packed_bytes)(const GatesCall&);
    int64_t (*scratch_bytes)(const GatesCall&);
    int64_t (*partial_bytes)(const GatesCall&);
    int64_t (*feature_blocks)(const GatesCall&);
    // for the forward pass where h.data is set, else for the backward pass: the two differ in their scale
    void (*pack)(const GatesCall&, void* packed);
    void (*forward)(const GatesCall&, const void* packed, void* scratch, int64_t row_begin, int64_t row_end);
    // partial may be null where no parameter gradient is wanted
    void (*backward)(const GatesCall&, const void* packed, void* scratch, void* partial, int64_t row_begin, int64_t row_end);
    // sums `count` partials, in their order, into dweight, dbias and dz_bias for a range of feature blocks
    void (*reduce)(const GatesCall&, const void* partials, int64_t count, int64_t block_begin, int64_t block_end);
};

namespace generic { extern const GatesKernels gates_kernels; }
#if defined(__x86_64__) && !defined(DEPTHLSTM_SANITIZED)
namespace avx2 { extern const GatesKernels gates_kernels; }
namespace avx512 { extern const GatesKernels gates_kernels; }
namespace avx512_bf16 { extern const GatesKernels gates_kernels; }
#endif

// The widest set this CPU has, or the one DEPTHLSTM_CPU_ISA names; null where that one cannot run here.
const GatesKernels* select_gates_kernels();

}  // namespace depthlstm
