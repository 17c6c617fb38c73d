// The CPU operators of layer_attend, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp the
// arithmetic.
#include <cstdlib>
#include <cstring>

#include "common/torch/parallel.h"
#include "common/torch/scratch.h"
#include "common/torch/sources.h"
#include "cpu.h"

namespace depthlstm {
namespace {

// As for the gates: above this traffic outputs are written past the caches. Those of 16 bits are not: two gradients at
// a time in half lines took 114 ms where ordinary stores take 41 (one thread, avx2, bf16, N=8192, C=512, 12 sources).
constexpr int64_t stream_bytes = int64_t(32) << 20;

const LayerAttendKernels& kernels() {
    const LayerAttendKernels* chosen = select_layer_attend_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

// The inputs of forward and backward, with the tensors that keep them alive.
struct AttendInputs {
    LayerAttendCall call;
    Sources sources;
    std::vector<Tensor> parameters;

    AttendInputs(const Tensors& given, const Tensor& query, const OptionalTensor& key_weight,
                 const OptionalTensor& weight, const OptionalTensor& bias, int64_t norm, double eps)
        : sources(given, true) {
        STD_TORCH_CHECK(norm >= 0 && norm <= int64_t(Normalisation::rms), "norm must be 0 or 1; found ", norm);
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        STD_TORCH_CHECK(weight || !bias, "weight must be given with bias");
        STD_TORCH_CHECK(!bias || Normalisation(norm) != Normalisation::rms, "bias must be None with norm rms");
        call.rows = sources.rows;
        call.features = sources.features;
        call.sources = int64_t(sources.list.size());
        call.dtype = sources.dtype;
        call.uniform = sources.uniform;
        call.norm = Normalisation(norm);
        call.eps = eps;
        call.source = sources.list.data();
        add(query, "query", given[0], call.query);
        add(key_weight, "key_weight", given[0], call.key_weight);
        add(weight, "weight", given[0], call.weight);
        add(bias, "bias", given[0], call.bias);
    }

    void add(const OptionalTensor& tensor, const char* argument, const Tensor& like, FeatureParameter& parameter) {
        if (!tensor) return;
        STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == call.features, argument, " must have shape (",
                        call.features, ",)");
        STD_TORCH_CHECK(device_of(*tensor) == device_of(like), argument, " must be on the device of sources");
        parameter.dtype = dtype_of(*tensor, argument);
        parameters.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
        parameter.data = parameters.back().const_data_ptr();
    }

    void set_stream(int64_t tensors) {
        const int64_t row_bytes = call.features * element_bytes(call.dtype);
        call.stream =
            element_bytes(call.dtype) > 2 && row_bytes % 64 == 0 && call.rows * row_bytes * tensors > stream_bytes;
    }

    int64_t row_elements() const { return call.features * (call.sources + 1); }
};

Tensor layer_attend_forward(const Tensors& given, const Tensor& query, const OptionalTensor& key_weight,
                            const OptionalTensor& weight, const OptionalTensor& bias, int64_t norm, double eps) {
    AttendInputs inputs(given, query, key_weight, weight, bias, norm, eps);
    LayerAttendCall& call = inputs.call;
    Tensor u = empty_as(given[0], torch_code(call.dtype));
    if (call.rows == 0) return u;
    call.u = {u.mutable_data_ptr(), call.features};
    inputs.set_stream(call.sources + 1);

    const LayerAttendKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    parallel_rows(call.rows, inputs.row_elements(), [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return u;
}

// A gradient that is not wanted, or has no tensor, has no elements.
std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> layer_attend_backward(
    const Tensor& du, const Tensors& given, const Tensor& query, const OptionalTensor& key_weight,
    const OptionalTensor& weight, const OptionalTensor& bias, int64_t norm, double eps, bool source_gradients,
    bool query_gradient, bool affine_gradient) {
    AttendInputs inputs(given, query, key_weight, weight, bias, norm, eps);
    LayerAttendCall& call = inputs.call;
    const RowView gradient = gradient_rows(du, given[0], call.features, call.dtype, "du");
    call.du = gradient.rows();
    call.source_gradients = source_gradients;
    call.query_gradient = query_gradient;
    call.affine_gradient = affine_gradient && weight;
    Tensors dsources;
    if (source_gradients) dsources = inputs.sources.gradients(given);
    const auto result = [&](const OptionalTensor& tensor, bool wanted, FeatureParameter& parameter) {
        if (!tensor || !wanted) return absent(query);
        Tensor made = empty_as(*tensor);
        parameter.gradient = made.mutable_data_ptr();
        if (call.rows == 0)
            std::memset(parameter.gradient, 0, std::size_t(call.features * element_bytes(parameter.dtype)));
        return made;
    };
    Tensor dquery = result(query, query_gradient, call.query);
    Tensor dkey_weight = result(key_weight, query_gradient, call.key_weight);
    Tensor dweight = result(weight, affine_gradient, call.weight);
    Tensor dbias = result(bias, affine_gradient, call.bias);
    if (call.rows == 0) return {dsources, dquery, dkey_weight, dweight, dbias};
    inputs.set_stream(2 * call.sources + 1);

    const LayerAttendKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const bool sums = query_gradient || call.affine_gradient;
    const Chunks chunks(call.rows);
    const int64_t partial_bytes = sums ? isa.partial_bytes(call) : 0;
    Scratch partials(chunks.count * partial_bytes);
    parallel_chunks(chunks, inputs.row_elements(), [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            void* partial = sums ? static_cast<char*>(partials.get()) + chunk * partial_bytes : nullptr;
            isa.backward(call, packed.get(), scratch.get(), partial, chunks.begin(chunk), chunks.end(chunk));
        }
    });
    if (sums) isa.reduce(call, partials.get(), chunks.count);
    return {dsources, dquery, dkey_weight, dweight, dbias};
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def(
        "layer_attend_forward(Tensor[] sources, Tensor query, Tensor? key_weight, Tensor? weight, Tensor? bias, int "
        "norm, float eps) -> (Tensor u)");
    m.def(
        "layer_attend_backward(Tensor du, Tensor[] sources, Tensor query, Tensor? key_weight, Tensor? weight, Tensor? "
        "bias, int norm, float eps, bool source_gradients, bool query_gradient, bool affine_gradient) -> (Tensor[] "
        "dsources, Tensor dquery, Tensor dkey_weight, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("layer_attend_forward", TORCH_BOX(&depthlstm::layer_attend_forward));
    m.impl("layer_attend_backward", TORCH_BOX(&depthlstm::layer_attend_backward));
}
