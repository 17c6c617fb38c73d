// What the operators of the CPU and of CUDA share: tensors checked and seen as rows, outputs allocated, a GatesCall filled in.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gates_call.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // torch 2.11 has this name only
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace depthlstm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t dtype_code(const Tensor& tensor) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    return code;
}

inline DType dtype_of(const Tensor& tensor, const char* argument) {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), bfloat16 = aoti_torch_dtype_bfloat16(),
                         float16 = aoti_torch_dtype_float16();
    const int32_t code = dtype_code(tensor);
    if (code == float32) return DType::float32;
    if (code == float64) return DType::float64;
    if (code == bfloat16) return DType::bfloat16;
    STD_TORCH_CHECK(code == float16, argument, " must be float32, float64, bfloat16 or float16");
    return DType::float16;
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Device {
    int32_t type, index;
    bool operator==(const Device&) const = default;
};

inline Device device_of(const Tensor& tensor) {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// Fresh outputs of this size come from mmap on a CPU, and their page faults cost more than the kernel: huge pages make them few.
// (N=4096, D=512, fp32 backward, noisy host: 16.5 ms before, 4.8 ms with torch's own THP_MEM_ALLOC_ENABLE=1, 5 to 13 ms with this.)
constexpr int64_t huge_bytes = int64_t(4) << 20;

inline void use_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    if (bytes < huge_bytes || !tensor.is_cpu()) return;
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + uintptr_t(bytes)) / page * page;
    // advice only: where the kernel knows no huge pages nothing changes
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const int64_t* sizes, int64_t dims, int32_t dtype, Device device) {
    int64_t strides[64];
    STD_TORCH_CHECK(dims <= 64, "at most 64 dimensions are supported; found ", dims);
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
    return Tensor(handle);
}

// Of the shape of `tensor`, contiguous, on its device.
inline Tensor empty_as(const Tensor& tensor, int32_t dtype) {
    const auto sizes = tensor.sizes();
    Tensor made = empty(sizes.data(), int64_t(sizes.size()), dtype, device_of(tensor));
    use_huge_pages(made, made.numel() * element_bytes(dtype_of(made, "output")));
    return made;
}

inline Tensor empty_as(const Tensor& tensor) { return empty_as(tensor, dtype_code(tensor)); }

inline Tensor absent(const Tensor& like) {
    const int64_t zero = 0;
    return empty(&zero, 1, dtype_code(like), device_of(like));
}

// A tensor (..., width) as rows that lie one stride apart; copied only where no single stride exists.
struct RowView {
    Tensor tensor;
    int64_t stride;
    ConstRows rows() const { return {tensor.const_data_ptr(), stride}; }
};

inline std::optional<int64_t> row_stride(const Tensor& tensor, int64_t width) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const int64_t last = int64_t(sizes.size()) - 1;
    if (width > 1 && strides[last] != 1) return std::nullopt;
    std::optional<int64_t> stride;
    int64_t expected = 0;
    for (int64_t i = last - 1; i >= 0; --i) {
        if (sizes[i] == 1) continue;
        if (!stride) {
            stride = strides[i];
        } else if (strides[i] != expected) {
            return std::nullopt;
        }
        expected = strides[i] * sizes[i];
    }
    return stride ? stride : width;
}

inline void check_rows(const Tensor& tensor, int64_t width, const char* argument, const Tensor& c, DType dtype) {
    const auto sizes = tensor.sizes();
    const auto wanted = c.sizes();
    bool matches = sizes.size() == wanted.size() && sizes[sizes.size() - 1] == width;
    for (std::size_t i = 0; matches && i + 1 < sizes.size(); ++i) matches = sizes[i] == wanted[i];
    STD_TORCH_CHECK(matches, argument, " must have the leading shape of c and a last dimension of ", width);
    STD_TORCH_CHECK(device_of(tensor) == device_of(c), argument, " must be on the device of c");
    STD_TORCH_CHECK(dtype_of(tensor, argument) == dtype, argument, " has another dtype than the tensors it belongs to");
}

inline RowView as_rows(const Tensor& tensor, int64_t width, const char* argument, const Tensor& c, DType dtype) {
    check_rows(tensor, width, argument, c, dtype);
    if (const auto stride = row_stride(tensor, width)) return {tensor, *stride};
    return {torch::stable::contiguous(tensor), width};
}

// Small per-feature parameters: contiguous, and of a type that the kernels read.
inline Tensor parameter(const Tensor& tensor, int64_t elements, const char* argument, const Tensor& c, DType z_dtype) {
    STD_TORCH_CHECK(tensor.numel() == elements, argument, " must have ", elements, " elements; found ", tensor.numel());
    STD_TORCH_CHECK(device_of(tensor) == device_of(c), argument, " must be on the device of c");
    const DType dtype = dtype_of(tensor, argument);
    STD_TORCH_CHECK(dtype == z_dtype || (dtype == DType::float32 && z_dtype != DType::float64), argument,
                    " must have the dtype of z, or float32 beside a 16-bit z");
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// What forward and backward read alike, with the tensors that keep it alive. The seed's value is left to the device's own code.
struct Inputs {
    GatesCall call;
    RowView z, c;
    std::optional<RowView> hidden;
    OptionalTensor z_bias, weight, bias;
    int64_t z_width = 0;

    Inputs(const Tensor& z_in, const OptionalTensor& z_bias_in, const OptionalTensor& hidden_in, const Tensor& c_in,
           const OptionalTensor& weight_in, const OptionalTensor& bias_in, const OptionalTensor& seed, int64_t norm, int64_t activation,
           double eps, double dropout_p)
        : z{z_in, 0}, c{c_in, 0} {
        STD_TORCH_CHECK(c_in.dim() >= 1 && c_in.size(c_in.dim() - 1) >= 1, "c must have shape (..., D) with D >= 1");
        STD_TORCH_CHECK(norm >= 0 && norm <= int64_t(Norm::none), "norm must be 0, 1 or 2; found ", norm);
        STD_TORCH_CHECK(activation >= 0 && activation < int64_t(Activation::given), "activation must be 0 to 5; found ", activation);
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1); found ", dropout_p);
        const int64_t features = c_in.size(c_in.dim() - 1);
        const int64_t gates = hidden_in ? 3 : 4;
        z_width = gates * features;
        call.rows = c_in.numel() / features;
        call.features = features;
        call.z_dtype = dtype_of(z_in, "z");
        call.c_dtype = dtype_of(c_in, "c");
        STD_TORCH_CHECK(call.c_dtype == call.z_dtype || (call.c_dtype == DType::float32 && call.z_dtype != DType::float64),
                        "c must have the dtype of z, or float32 beside a 16-bit z");
        call.norm = Norm(norm);
        call.activation = hidden_in ? Activation::given : Activation(activation);
        call.eps = eps;
        if (seed) {
            STD_TORCH_CHECK(device_of(*seed) == device_of(c_in) && seed->numel() == 1 && dtype_code(*seed) == aoti_torch_dtype_int64(),
                            "seed must be an int64 tensor of one element on the device of c");
            call.dropout_p = dropout_p;
        }
        z = as_rows(z_in, z_width, "z", c_in, call.z_dtype);
        c = as_rows(c_in, features, "c", c_in, call.c_dtype);
        call.z = z.rows();
        call.c = c.rows();
        if (hidden_in) {
            hidden = as_rows(*hidden_in, features, "hidden", c_in, call.z_dtype);
            call.hidden = hidden->rows();
        }
        if (z_bias_in) {
            z_bias = parameter(*z_bias_in, z_width, "z_bias", c_in, call.z_dtype);
            call.z_bias = z_bias->const_data_ptr();
            call.z_bias_dtype = dtype_of(*z_bias, "z_bias");
        }
        STD_TORCH_CHECK(weight_in.has_value() == bias_in.has_value(), "weight and bias must both be given or both be None");
        if (weight_in) {
            STD_TORCH_CHECK(call.norm != Norm::none, "weight and bias must be None with norm none");
            weight = parameter(*weight_in, z_width, "weight", c_in, call.z_dtype);
            bias = parameter(*bias_in, z_width, "bias", c_in, call.z_dtype);
            call.weight = weight->const_data_ptr();
            call.bias = bias->const_data_ptr();
            call.affine_dtype = dtype_of(*weight, "weight");
            STD_TORCH_CHECK(dtype_of(*bias, "bias") == call.affine_dtype, "bias must have the dtype of weight");
        }
    }
};

// The backward pass's own operands: the gradients that come in, null where None, and those that go out, with no elements where they
// were not asked for or have no input.
struct Gradients {
    std::optional<RowView> dh, dc;
    Tensor dz, dhidden, dc_in, dweight, dbias, dz_bias;
    bool affine, z_bias;

    Gradients(GatesCall& call, const OptionalTensor& dh_in, const OptionalTensor& dc_out, const Tensor& z, const OptionalTensor& z_bias_in,
              const OptionalTensor& hidden, const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias, bool affine_gradient,
              bool z_bias_gradient)
        : dz(empty_as(z)),
          dhidden(hidden ? empty_as(*hidden) : absent(z)),
          dc_in(empty_as(c)),
          dweight(affine_gradient && weight ? empty_as(*weight) : absent(z)),
          dbias(affine_gradient && weight ? empty_as(*bias) : absent(z)),
          dz_bias(z_bias_gradient && z_bias_in ? empty_as(*z_bias_in) : absent(z)),
          affine(affine_gradient && weight),
          z_bias(z_bias_gradient && z_bias_in) {
        if (dh_in) {
            dh = as_rows(*dh_in, call.features, "dh", c, call.z_dtype);
            call.dh = dh->rows();
        }
        if (dc_out) {
            dc = as_rows(*dc_out, call.features, "dc", c, call.c_dtype);
            call.dc = dc->rows();
        }
        call.dz = {dz.mutable_data_ptr(), z.size(z.dim() - 1)};
        call.dc_in = {dc_in.mutable_data_ptr(), call.features};
        if (hidden) call.dhidden = {dhidden.mutable_data_ptr(), call.features};
        if (affine) call.dweight = dweight.mutable_data_ptr(), call.dbias = dbias.mutable_data_ptr();
        if (z_bias) call.dz_bias = dz_bias.mutable_data_ptr();
    }

    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const { return {dz, dhidden, dc_in, dweight, dbias, dz_bias}; }
};

}  // namespace depthlstm
