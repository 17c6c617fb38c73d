// The CPU operators of layer_mix, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp the
// arithmetic.
#include <cstdlib>
#include <cstring>

#include "common/torch/parallel.h"
#include "common/torch/scratch.h"
#include "common/torch/sources.h"
#include "cpu.h"

namespace depthlstm {
namespace {

// As for the gates: above this traffic outputs are written past the caches.
constexpr int64_t stream_bytes = int64_t(32) << 20;

const LayerMixKernels& kernels() {
    const LayerMixKernels* chosen = select_layer_mix_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

LayerMixCall call_of(const Sources& sources, const Tensor& weights, const Tensor& like) {
    STD_TORCH_CHECK(weights.dim() == 2 && weights.size(1) == int64_t(sources.list.size()),
                    "weights must have shape (V, ", sources.list.size(), ")");
    STD_TORCH_CHECK(device_of(weights) == device_of(like), "weights must be on the device of sources");
    LayerMixCall call;
    call.rows = sources.rows;
    call.features = sources.features;
    call.sources = int64_t(sources.list.size());
    call.dtype = sources.dtype;
    call.uniform = sources.uniform;
    call.source = sources.list.data();
    call.weights = weights.const_data_ptr();
    call.weights_dtype = dtype_of(weights, "weights");
    call.weight_strides[0] = weights.stride(0);
    call.weight_strides[1] = weights.stride(1);
    return call;
}

// Dense rows are one long row, so that the tiles do not depend on C.
void flatten(LayerMixCall& call) {
    call.features *= call.rows;
    call.rows = 1;
}

int64_t grain(const LayerMixCall& call, int64_t items) {
    const int64_t elements = call.rows * call.features * (call.sources + call.outputs);
    return std::max<int64_t>(1, grain_elements * items / std::max<int64_t>(elements, 1));
}

void set_stream(LayerMixCall& call, int64_t tensors) {
    const bool aligned = call.rows <= 1 || call.features * element_bytes(call.dtype) % 64 == 0;
    call.stream = aligned && call.rows * call.features * element_bytes(call.dtype) * tensors > stream_bytes;
}

Tensors layer_mix_forward(const Tensors& given, const Tensor& weights) {
    const Sources sources(given, true);
    LayerMixCall call = call_of(sources, weights, given[0]);
    call.outputs = weights.size(0);
    Tensors outputs;
    std::vector<Rows> rows;
    std::vector<int64_t> numbers;
    for (int64_t v = 0; v < call.outputs; ++v) {
        outputs.push_back(empty_as(given[0], torch_code(call.dtype)));
        rows.push_back({outputs.back().mutable_data_ptr(), call.features});
        numbers.push_back(v);
    }
    if (call.rows == 0 || call.outputs == 0) return outputs;
    call.u = rows.data();
    call.output = numbers.data();
    if (sources.dense) flatten(call);
    set_stream(call, call.sources + call.outputs);

    const LayerMixKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const int64_t items = isa.items(call);
    torch::stable::parallel_for(0, items, grain(call, items), [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return outputs;
}

// A du of None stands for zeros. Without weight_gradient the sources' values are not read.
std::tuple<Tensors, Tensor> layer_mix_backward(const std::vector<OptionalTensor>& du, const Tensors& given,
                                               const Tensor& weights, bool source_gradients, bool weight_gradient) {
    Sources sources(given, weight_gradient);
    LayerMixCall call = call_of(sources, weights, given[0]);
    STD_TORCH_CHECK(int64_t(du.size()) == weights.size(0), "du must hold a tensor or None for each of the ",
                    weights.size(0), " rows of weights; found ", du.size());
    call.source_gradients = source_gradients;
    call.weight_gradient = weight_gradient;
    std::vector<RowView> views;
    std::vector<ConstRows> rows;
    std::vector<int64_t> numbers;
    bool dense = sources.dense;
    for (std::size_t v = 0; v < du.size(); ++v) {
        if (!du[v]) continue;
        views.push_back(gradient_rows(*du[v], given[0], call.features, call.dtype, "du"));
        rows.push_back(views.back().rows());
        numbers.push_back(int64_t(v));
        dense = dense && (views.back().stride == call.features || call.rows <= 1);
    }
    Tensors dsources;
    if (source_gradients) dsources = sources.gradients(given);
    call.source = sources.list.data();
    Tensor dweights = weight_gradient ? empty_as(weights) : absent(weights);
    call.du = rows.data();
    call.output = numbers.data();
    call.outputs = int64_t(rows.size());
    call.dweights = dweights.mutable_data_ptr();
    const auto clear = [](Tensor& tensor) {
        std::memset(tensor.mutable_data_ptr(), 0, std::size_t(tensor.numel() * element_bytes(dtype_of(tensor, ""))));
    };
    if (weight_gradient && (call.rows == 0 || call.outputs < int64_t(du.size()))) clear(dweights);
    if (call.outputs == 0)
        for (Tensor& tensor : dsources) clear(tensor);
    if (call.rows == 0 || call.outputs == 0 || !(source_gradients || weight_gradient)) return {dsources, dweights};
    if (dense) flatten(call);
    set_stream(call, call.sources * (1 + int(weight_gradient)) + call.outputs);

    const LayerMixKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const Chunks chunks(isa.items(call));
    const int64_t sums = weight_gradient ? call.sources * call.outputs : 0;
    Scratch partials(chunks.count * sums * int64_t(sizeof(double)));
    std::memset(partials.get(), 0, std::size_t(chunks.count * sums) * sizeof(double));
    const int64_t chunk_grain = std::max<int64_t>(1, grain(call, chunks.rows) / chunks.chunk_rows);
    torch::stable::parallel_for(0, chunks.count, chunk_grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            double* partial = static_cast<double*>(partials.get()) + chunk * sums;
            isa.backward(call, packed.get(), scratch.get(), partial, chunks.begin(chunk), chunks.end(chunk));
        }
    });
    if (weight_gradient) isa.reduce(call, static_cast<const double*>(partials.get()), chunks.count);
    return {dsources, dweights};
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def("layer_mix_forward(Tensor[] sources, Tensor weights) -> (Tensor[] outputs)");
    m.def(
        "layer_mix_backward(Tensor?[] du, Tensor[] sources, Tensor weights, bool source_gradients, bool "
        "weight_gradient) -> (Tensor[] dsources, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("layer_mix_forward", TORCH_BOX(&depthlstm::layer_mix_forward));
    m.impl("layer_mix_backward", TORCH_BOX(&depthlstm::layer_mix_backward));
}
