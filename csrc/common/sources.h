// A list of tensors with rows of one shape, for the ops that gather earlier layers' outputs: plain pointers, no torch.
#pragma once

#include "types.h"

namespace depthlstm {

// One tensor of the list, of its own dtype and row stride, and its gradient, whose rows are dense.
struct Source {
    const void* data = nullptr;  // null where the values are not read
    int64_t stride = 0;
    DType dtype = DType::float32;
    void* gradient = nullptr;  // null where it is not wanted
};

}  // namespace depthlstm
