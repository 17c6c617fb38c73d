// Tensors of torch's stable ABI: checks, views as rows, allocation of outputs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu/pool.h"
#include "common/types.h"

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
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                         bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
    const int32_t code = dtype_code(tensor);
    if (code == float32) return DType::float32;
    if (code == float64) return DType::float64;
    if (code == bfloat16) return DType::bfloat16;
    STD_TORCH_CHECK(code == float16, argument, " must be float32, float64, bfloat16 or float16");
    return DType::float16;
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Of an element of a code of torch's; 0 for what is no floating-point type of ours, as a workspace of bytes.
inline int64_t float_bytes(int32_t code) {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
                         bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
    return code == float64 ? 8 : code == float32 ? 4 : code == bfloat16 || code == float16 ? 2 : 0;
}

struct TensorDevice {
    int32_t type, index;
    bool operator==(const TensorDevice&) const = default;
};

inline TensorDevice device_of(const Tensor& tensor) {
    TensorDevice device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

// Without the pool a CPU gets fresh outputs of this size from mmap, and their page faults cost more than the kernel.
// Huge pages make the faults few. (N=4096, D=512, fp32 backward, noisy host: 16.5 ms before, 4.8 ms with torch's own
// THP_MEM_ALLOC_ENABLE=1, 5 to 13 ms with this.)
inline void use_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    if (bytes < pool_least_bytes || !tensor.is_cpu()) return;
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + uintptr_t(bytes)) / page * page;
    // advice only: a kernel without huge pages ignores it
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A tensor in a block of the pool; nothing where the tensor is small, on another device, or the pool has no memory.
inline std::optional<Tensor> from_pool(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype,
                                       TensorDevice device) {
    int64_t bytes = float_bytes(dtype);
    for (int64_t i = 0; i < dims; ++i) bytes *= sizes[i];
    if (bytes < pool_least_bytes || device.type != aoti_torch_device_type_cpu()) return std::nullopt;
    int64_t capacity = 0;
    void* block = pool_take(bytes, &capacity);
    if (block == nullptr) return std::nullopt;
    const auto give_back = [](void* data, void* context) { pool_give_back(data, reinterpret_cast<int64_t>(context)); };
    AtenTensorHandle handle;
    const AOTITorchError error =
        torch_from_blob(block, dims, sizes, strides, 0, dtype, device.type, device.index, &handle,
                        aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(capacity));
    if (error != AOTI_TORCH_SUCCESS) pool_give_back(block, capacity);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    return Tensor(handle);
}

inline Tensor empty(const int64_t* sizes, int64_t dims, int32_t dtype, TensorDevice device) {
    int64_t strides[64];
    STD_TORCH_CHECK(dims <= 64, "at most 64 dimensions are supported; found ", dims);
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    if (const auto pooled = from_pool(sizes, strides, dims, dtype, device)) return *pooled;
    AtenTensorHandle handle;
    // the stable ABI gives a code in place of the allocator's message
    const AOTITorchError error =
        aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch cannot allocate memory for an output of ", stride, " elements");
    Tensor made(handle);
    use_huge_pages(made, stride * float_bytes(dtype));
    return made;
}

// A contiguous tensor of the shape of `tensor`, on its device.
inline Tensor empty_as(const Tensor& tensor, int32_t dtype) {
    const auto sizes = tensor.sizes();
    return empty(sizes.data(), int64_t(sizes.size()), dtype, device_of(tensor));
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

// Checks a small per-feature parameter: its size, and a type that the kernels read. Returns it contiguous.
inline Tensor parameter(const Tensor& tensor, int64_t elements, const char* argument, const Tensor& c, DType z_dtype) {
    STD_TORCH_CHECK(tensor.numel() == elements, argument, " must have ", elements, " elements; found ", tensor.numel());
    STD_TORCH_CHECK(device_of(tensor) == device_of(c), argument, " must be on the device of c");
    const DType dtype = dtype_of(tensor, argument);
    STD_TORCH_CHECK(dtype == z_dtype || (dtype == DType::float32 && z_dtype != DType::float64), argument,
                    " must have the dtype of z, or float32 beside a 16-bit z");
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace depthlstm
