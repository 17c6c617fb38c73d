// A list of tensors as the kernels take it: checked, seen as rows, never stacked.
#pragma once

#include <vector>

#include "common/sources.h"
#include "tensors.h"

namespace depthlstm {

using Tensors = std::vector<Tensor>;

// The dtype of a result of two dtypes, as torch promotes them.
inline DType wider(DType a, DType b) {
    if (a == b) return a;
    return a == DType::float64 || b == DType::float64 ? DType::float64 : DType::float32;
}

inline int32_t torch_code(DType dtype) {
    switch (dtype) {
        case DType::float32: return aoti_torch_dtype_float32();
        case DType::float64: return aoti_torch_dtype_float64();
        case DType::bfloat16: return aoti_torch_dtype_bfloat16();
        default: return aoti_torch_dtype_float16();
    }
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
    const auto x = a.sizes(), y = b.sizes();
    return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

// The sources of a call, with the tensors that keep them alive. `is_read`: the values are wanted, not only the shapes.
struct Sources {
    std::vector<Source> list;
    std::vector<Tensor> alive;
    int64_t rows = 0, features = 0;
    DType dtype = DType::float32;
    bool uniform = true, dense = true;

    Sources(const Tensors& given, bool is_read) {
        STD_TORCH_CHECK(!given.empty(), "sources must hold at least one tensor; found none");
        const Tensor& like = given[0];
        STD_TORCH_CHECK(like.dim() >= 1 && like.size(like.dim() - 1) >= 1,
                        "sources must have shape (..., C) with C >= 1");
        features = like.size(like.dim() - 1);
        rows = like.numel() / features;
        dtype = dtype_of(like, "sources[0]");
        list.reserve(given.size());
        for (const Tensor& tensor : given) {
            STD_TORCH_CHECK(same_sizes(tensor, like), "sources must have one shape");
            STD_TORCH_CHECK(device_of(tensor) == device_of(like), "sources must be on one device");
            Source source;
            source.dtype = dtype_of(tensor, "sources");
            dtype = wider(dtype, source.dtype);
            if (is_read) {
                const auto stride = row_stride(tensor, features);
                alive.push_back(stride ? tensor : torch::stable::contiguous(tensor));
                source.data = alive.back().const_data_ptr();
                source.stride = stride ? *stride : features;
                dense = dense && (source.stride == features || rows <= 1);
            }
            list.push_back(source);
        }
        for (const Source& source : list) uniform = uniform && source.dtype == dtype;
    }

    // Makes the gradients, whose rows are dense.
    Tensors gradients(const Tensors& given) {
        Tensors made;
        made.reserve(given.size());
        for (std::size_t i = 0; i < given.size(); ++i) {
            made.push_back(empty_as(given[i]));
            list[i].gradient = made.back().mutable_data_ptr();
        }
        return made;
    }
};

// A gradient of an output, as rows beside the sources.
inline RowView gradient_rows(const Tensor& tensor, const Tensor& like, int64_t features, DType dtype,
                             const char* argument) {
    STD_TORCH_CHECK(same_sizes(tensor, like), argument, " must have the shape of sources");
    STD_TORCH_CHECK(device_of(tensor) == device_of(like), argument, " must be on the device of sources");
    STD_TORCH_CHECK(dtype_of(tensor, argument) == dtype, argument, " must have the widest dtype of sources");
    if (const auto stride = row_stride(tensor, features)) return {tensor, *stride};
    return {torch::stable::contiguous(tensor), features};
}

}  // namespace depthlstm
