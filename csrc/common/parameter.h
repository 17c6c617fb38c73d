// A parameter by features, and the affine of a norm: plain pointers, no torch, no STL.
#pragma once

#include "types.h"

namespace depthlstm {

// Null where it is absent; the gradient has the parameter's dtype, and is null where it is not wanted.
struct Parameter {
    const void* data = nullptr;
    void* gradient = nullptr;
    DType dtype = DType::float32;
};

// A norm is there if its weight is.
struct Affine {
    Parameter weight, bias;
    bool there() const { return weight.data != nullptr; }
};

}  // namespace depthlstm
