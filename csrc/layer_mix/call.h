// Arguments of the CPU kernels of layer_mix: plain pointers, no torch, no STL.
//
//     u_v = sum_l w_vl x_l        dx_l = sum_v w_vl du_v        dw_vl = <x_l, du_v>
//
// depthlstm_fast/reference/layer_mix.py has the same in PyTorch.
#pragma once

#include "common/sources.h"

namespace depthlstm {

struct LayerMixCall {
    int64_t rows = 0;
    int64_t features = 0;           // C; where every tensor is dense, rows is 1 and this is all elements
    int64_t sources = 0;            // L
    int64_t outputs = 0;            // V; backward: those that have a gradient
    DType dtype = DType::float32;   // of every output: the widest of the sources'
    bool uniform = true;            // every source has this dtype
    bool stream = false;            // write past the caches; needs 64-byte aligned rows
    bool source_gradients = false;  // backward only, as weight_gradient
    bool weight_gradient = false;

    const Source* source = nullptr;   // (L)
    const void* weights = nullptr;    // element (v, l) at output[v] * weight_strides[0] + l * weight_strides[1]
    const int64_t* output = nullptr;  // (V): its row of the weights
    int64_t weight_strides[2] = {0, 0};
    DType weights_dtype = DType::float32;

    const Rows* u = nullptr;        // forward: (V)
    const ConstRows* du = nullptr;  // backward: (V), of `dtype`
    void* dweights = nullptr;       // dense, of weights_dtype, with a row for each output of the forward pass
};

}  // namespace depthlstm
