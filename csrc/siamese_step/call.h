// Arguments of the kernels of siamese_step: plain pointers, no torch, no STL. depthlstm_fast/reference/siamese_step.py
// has the mathematics in PyTorch.
//
//     X' = N_x(X + o / c)      Y' = Y + o      u = [N](X' + N_y Y')
#pragma once

#include "common/parameter.h"

namespace depthlstm {

struct SiameseStepCall {
    int64_t rows = 0;
    int64_t features = 0;
    DType stream_dtype = DType::float32;  // of x, y, x_out, y_out and their gradients
    DType o_dtype = DType::float32;       // of o, u and their gradients
    bool rms = false;
    double eps = 1e-6;
    double c = 1;
    bool stream = false;  // write the outputs past the caches; needs 64-byte aligned rows
    Affine x_norm, y_norm, norm;

    ConstRows x, y, o;
    Rows x_out, y_out, u;          // forward
    ConstRows dx_out, dy_out, du;  // backward; a stride of 0 is fine
    Rows dx, dy, d_o;
};

}  // namespace depthlstm
