// The CPU operators of the depth-wise GRU, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp
// the arithmetic.
#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "common/torch/parallel.h"
#include "common/torch/scratch.h"
#include "common/torch/tensors.h"
#include "cpu.h"

namespace depthlstm {
namespace {

// Above this traffic the outputs are written past the caches, as those of csrc/depth_lstm/cpu_op.cpp.
constexpr int64_t stream_bytes = int64_t(32) << 20;

const GruKernels& kernels() {
    const GruKernels* chosen = select_gru_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

// A tensor (..., width) with the leading shape of h, as rows.
RowView rows_beside(const Tensor& h, const Tensor& tensor, int64_t width, const char* argument, DType dtype) {
    const auto sizes = tensor.sizes(), wanted = h.sizes();
    bool matches = sizes.size() == wanted.size() && sizes[sizes.size() - 1] == width;
    for (std::size_t i = 0; matches && i + 1 < sizes.size(); ++i) matches = sizes[i] == wanted[i];
    STD_TORCH_CHECK(matches, argument, " must have the leading shape of h and a last dimension of ", width);
    STD_TORCH_CHECK(device_of(tensor) == device_of(h), argument, " must be on the device of h");
    STD_TORCH_CHECK(dtype_of(tensor, argument) == dtype, argument, " has another dtype than the tensors it belongs to");
    if (const auto stride = row_stride(tensor, width)) return {tensor, *stride};
    return {torch::stable::contiguous(tensor), width};
}

// The type of z, or fp32 beside 16 bits.
DType companion_dtype(const Tensor& tensor, const char* argument, DType z_dtype) {
    const DType found = dtype_of(tensor, argument);
    STD_TORCH_CHECK(found == z_dtype || (found == DType::float32 && element_bytes(z_dtype) == 2), argument,
                    " must have the dtype of z, or float32 beside a 16-bit z");
    return found;
}

OptionalTensor affine_part(const OptionalTensor& tensor, const char* argument, const Tensor& h, const GruCall& call) {
    if (!tensor) return std::nullopt;
    const auto sizes = tensor->sizes();
    STD_TORCH_CHECK(sizes.size() == 2 && sizes[0] == gru_gates && sizes[1] == call.features, argument,
                    " must have shape (", gru_gates, ", ", call.features, ")");
    STD_TORCH_CHECK(device_of(*tensor) == device_of(h), argument, " must be on the device of h");
    return tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
}

// The common inputs of forward and backward, with the tensors that keep them alive.
struct Inputs {
    GruCall call;
    RowView z, h;
    OptionalTensor weight, bias;

    Inputs(const Tensor& z_in, const Tensor& h_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in,
           double eps)
        : z{z_in, 0}, h{h_in, 0} {
        STD_TORCH_CHECK(h_in.dim() >= 1 && h_in.size(h_in.dim() - 1) >= 1, "h must have shape (..., C) with C >= 1");
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        STD_TORCH_CHECK(weight_in.has_value() == bias_in.has_value(),
                        "weight and bias must both be given or both be None");
        call.features = h_in.size(h_in.dim() - 1);
        call.rows = h_in.numel() / call.features;
        call.eps = eps;
        call.z_dtype = dtype_of(z_in, "z");
        call.h_dtype = companion_dtype(h_in, "h", call.z_dtype);
        z = rows_beside(h_in, z_in, gru_gates * call.features, "z", call.z_dtype);
        h = rows_beside(h_in, h_in, call.features, "h", call.h_dtype);
        call.z = z.rows();
        call.h = h.rows();
        weight = affine_part(weight_in, "weight", h_in, call);
        bias = affine_part(bias_in, "bias", h_in, call);
        if (weight) {
            call.weight = weight->const_data_ptr();
            call.bias = bias->const_data_ptr();
            call.weight_dtype = companion_dtype(*weight, "weight", call.z_dtype);
            call.bias_dtype = companion_dtype(*bias, "bias", call.z_dtype);
        }
    }

    // Whether outputs that are read and written with `z_vectors` of z's and `h_vectors` of h's rows are streamed.
    bool streams(int64_t z_vectors, int64_t h_vectors) const {
        const int64_t row = z_vectors * element_bytes(call.z_dtype) + h_vectors * element_bytes(call.h_dtype);
        return call.rows * call.features * row > stream_bytes && call.features % 64 == 0;
    }
};

Tensor forward(const Tensor& z, const Tensor& h, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
    Inputs inputs(z, h, weight, bias, eps);
    GruCall& call = inputs.call;
    Tensor h_out = empty_as(h);
    if (call.rows == 0) return h_out;
    call.h_out = {h_out.mutable_data_ptr(), call.features};
    call.stream = inputs.streams(4, 2) && element_bytes(call.h_dtype) > 2;

    const GruKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    if (call.weight != nullptr) isa.pack(call, packed.get());
    parallel_rows(call.rows, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return h_out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dh_out, const Tensor& z, const Tensor& h,
                                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                                    double eps, bool affine_gradient) {
    Inputs inputs(z, h, weight, bias, eps);
    GruCall& call = inputs.call;
    const RowView gradient = rows_beside(h, dh_out, call.features, "dh_out", call.h_dtype);
    const bool sums = affine_gradient && weight;
    Tensor dz = empty_as(z), dh = empty_as(h);
    Tensor dweight = sums ? empty_as(*weight) : absent(z), dbias = sums ? empty_as(*bias) : absent(z);
    call.dh_out = gradient.rows();
    call.dz = {dz.mutable_data_ptr(), gru_gates * call.features};
    call.dh = {dh.mutable_data_ptr(), call.features};
    if (sums) call.dweight = dweight.mutable_data_ptr(), call.dbias = dbias.mutable_data_ptr();
    call.stream = inputs.streams(8, 3);

    const GruKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    if (call.weight != nullptr) isa.pack(call, packed.get());
    const Chunks chunks(call.rows);
    const int64_t partial_bytes = isa.partial_bytes(call);
    Scratch partials(sums ? chunks.count * partial_bytes : 0);
    parallel_chunks(chunks, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            void* partial = sums ? static_cast<char*>(partials.get()) + chunk * partial_bytes : nullptr;
            isa.backward(call, packed.get(), scratch.get(), partial, chunks.begin(chunk), chunks.end(chunk));
        }
    });
    if (sums) {
        const int64_t block_grain =
            std::max<int64_t>(1, grain_elements / (16 * 2 * gru_gates * std::max<int64_t>(chunks.count, 1)));
        torch::stable::parallel_for(0, isa.feature_blocks(call), block_grain, [&](int64_t begin, int64_t end) {
            isa.reduce(call, partials.get(), chunks.count, begin, end);
        });
    }
    return {dz, dh, dweight, dbias};
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def("depth_gru_gates_forward(Tensor z, Tensor h, Tensor? weight, Tensor? bias, float eps) -> (Tensor h_out)");
    m.def(
        "depth_gru_gates_backward(Tensor dh_out, Tensor z, Tensor h, Tensor? weight, Tensor? bias, float eps, bool "
        "affine_gradient) -> (Tensor dz, Tensor dh, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("depth_gru_gates_forward", TORCH_BOX(&depthlstm::forward));
    m.impl("depth_gru_gates_backward", TORCH_BOX(&depthlstm::backward));
}
