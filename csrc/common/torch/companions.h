// Tensors checked beside the one that gives an op its shape: rows of the same shape, and parameters by features.
#pragma once

#include <optional>

#include "common/parameter.h"
#include "tensors.h"

namespace depthlstm {

// Checks and views operands of an op beside a tensor (..., C), which the messages call `name`.
struct Companions {
    const Tensor& like;
    const char* name;
    int64_t features;
    DType dtype;

    Companions(const Tensor& like, const char* name) : like(like), name(name) {
        STD_TORCH_CHECK(like.dim() >= 1 && like.size(like.dim() - 1) >= 1, name,
                        " must have shape (..., C) with C >= 1");
        features = like.size(like.dim() - 1);
        dtype = dtype_of(like, name);
    }

    int64_t rows() const { return like.numel() / features; }

    // The type itself, or fp32 beside 16 bits.
    DType companion_dtype(const Tensor& tensor, const char* argument) const {
        const DType found = dtype_of(tensor, argument);
        STD_TORCH_CHECK(found == dtype || (found == DType::float32 && element_bytes(dtype) == 2), argument,
                        " must have the dtype of ", name, ", or float32 beside a 16-bit ", name);
        return found;
    }

    RowView view(const Tensor& tensor, const char* argument, DType wanted) const {
        const auto sizes = tensor.sizes(), as = like.sizes();
        bool matches = sizes.size() == as.size();
        for (std::size_t i = 0; matches && i < sizes.size(); ++i) matches = sizes[i] == as[i];
        STD_TORCH_CHECK(matches, argument, " must have the shape of ", name);
        STD_TORCH_CHECK(device_of(tensor) == device_of(like), argument, " must be on the device of ", name);
        STD_TORCH_CHECK(dtype_of(tensor, argument) == wanted, argument,
                        " has another dtype than the tensors it belongs to");
        if (const auto stride = row_stride(tensor, features)) return {tensor, *stride};
        return {torch::stable::contiguous(tensor), features};
    }

    // Returns the parameter contiguous, which has to outlive the call, and fills in where it lies.
    OptionalTensor parameter(const OptionalTensor& tensor, const char* argument, int64_t elements,
                             Parameter& parameter) const {
        if (!tensor) return std::nullopt;
        STD_TORCH_CHECK(tensor->numel() == elements, argument, " must have ", elements, " elements; found ",
                        tensor->numel());
        STD_TORCH_CHECK(device_of(*tensor) == device_of(like), argument, " must be on the device of ", name);
        parameter.dtype = companion_dtype(*tensor, argument);
        Tensor dense = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
        parameter.data = dense.const_data_ptr();
        return dense;
    }
};

// The gradient of a parameter, without elements where there is none.
inline Tensor gradient_of(const OptionalTensor& tensor, bool wanted, const Tensor& like, Parameter& parameter) {
    if (!tensor || !wanted) return absent(like);
    Tensor made = empty_as(*tensor);
    parameter.gradient = made.mutable_data_ptr();
    return made;
}

}  // namespace depthlstm
