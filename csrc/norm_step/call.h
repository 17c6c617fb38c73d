// Arguments of the kernels of norm_step: plain pointers, no torch, no STL. depthlstm_fast/reference/norm_step.py has
// the mathematics in PyTorch.
//
//     x' = [N1](a x + b [N3] y)      u = [N2] x'
#pragma once

#include "common/parameter.h"

namespace depthlstm {

struct NormStepCall {
    int64_t rows = 0;
    int64_t features = 0;
    DType x_dtype = DType::float32;  // of x, x_out and their gradients
    DType y_dtype = DType::float32;  // of y, u and their gradients
    bool rms = false;
    double eps = 1e-6;
    double a = 1, b = 1;
    bool stream = false;  // write the outputs past the caches; needs 64-byte aligned rows
    Parameter scale;      // a learned b: of one element or one for each feature; without it b is a number
    bool one_scale = false;
    Affine norm[3];  // N1, N2, N3

    // Backward reads x and y with N1, y with N3 or a learned b, and x_out with N2 alone.
    ConstRows x, y;
    ConstRows x_out_read;
    Rows x_out, u;         // forward; u with N2
    ConstRows dx_out, du;  // backward; a stride of 0 is fine; du with N2
    Rows dx, dy;           // dy is null where it equals dx
};

}  // namespace depthlstm
