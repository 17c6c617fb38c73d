// Arguments of the CPU kernels of layer_attend: plain pointers, no torch, no STL. A row is one token.
//
//     s_l = <query * key_weight, x_l> / rms(x_l)      p = softmax(s)      y = sum_l p_l x_l      u = [N](y)
//
// Source: Attention Residuals, arXiv 2603.15031. depthlstm_fast/reference/layer_attend.py has the same in PyTorch.
#pragma once

#include "common/sources.h"

namespace depthlstm {

enum class Normalisation : int32_t { layer, rms };

// Null where it is absent. Its gradient has its dtype, and is null where it is not wanted.
struct FeatureParameter {
    const void* data = nullptr;
    DType dtype = DType::float32;
    void* gradient = nullptr;
};

struct LayerAttendCall {
    int64_t rows = 0;
    int64_t features = 0;          // C
    int64_t sources = 0;           // L
    DType dtype = DType::float32;  // of u and du: the widest of the sources'
    bool uniform = true;           // every source has this dtype
    bool stream = false;           // write past the caches; needs 64-byte aligned rows
    Normalisation norm = Normalisation::layer;
    double eps = 1e-6;

    const Source* source = nullptr;                    // (L)
    FeatureParameter query, key_weight, weight, bias;  // (C); without a weight there is no N

    Rows u;        // forward: (rows, C)
    ConstRows du;  // backward: (rows, C)
    bool source_gradients = false, query_gradient = false, affine_gradient = false;
};

}  // namespace depthlstm
