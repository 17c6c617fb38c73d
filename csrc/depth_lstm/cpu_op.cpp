// The CPU operators of the gates, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp the
// arithmetic.
#include <cstdlib>
#include <cstring>

#include "common/torch/parallel.h"
#include "common/torch/scratch.h"
#include "cpu.h"
#include "operands.h"

namespace depthlstm {
namespace {

// Above this traffic no last-level cache of this class keeps the outputs until they are read, so they are written past
// the caches. Stand-alone, best of 15 on a noisy host, N=4096, D=512: backward 4.6 -> 3.4 ms (fp32), 3.4 -> 2.8 ms
// (bf16), forward 2.2 -> 1.9 ms (fp32). The forward pass of 16-bit types keeps ordinary stores, because its half-line
// writes get slower that way (1.4 -> 1.6 ms).
constexpr int64_t stream_bytes = int64_t(32) << 20;

const GatesKernels& kernels() {
    const GatesKernels* chosen = select_gates_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

// Copies the seed's value into the call, where the kernels read it.
void set_seed(GatesCall& call, const OptionalTensor& seed) {
    if (seed) call.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
}

std::tuple<Tensor, Tensor> gates_forward(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden,
                                         const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& seed, int64_t norm, int64_t activation, double eps,
                                         double dropout_p) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    set_seed(call, seed);
    Tensor h = empty_as(c, dtype_code(z));
    Tensor c_out = empty_as(c);
    if (call.rows == 0) return {h, c_out};
    call.h = {h.mutable_data_ptr(), call.features};
    call.c_out = {c_out.mutable_data_ptr(), call.features};
    const int64_t traffic =
        call.rows * call.features * (5 * element_bytes(call.z_dtype) + 2 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0 && element_bytes(call.z_dtype) > 2;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    parallel_rows(call.rows, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return {h, c_out};
}

// dh or dc may be None for zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gates_backward(
    const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& z, const OptionalTensor& z_bias,
    const OptionalTensor& hidden, const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& seed, int64_t norm, int64_t activation, double eps, double dropout_p, bool affine_gradient,
    bool z_bias_gradient) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    set_seed(call, seed);
    const Gradients gradients(call, dh, dc, z, z_bias, hidden, c, weight, bias, affine_gradient, z_bias_gradient);
    Scratch zeros(dh && dc ? 0 : call.features * 8);  // one row, which every row reads
    if (!dh || !dc) std::memset(zeros.get(), 0, std::size_t(call.features) * 8);
    if (!dh) call.dh = {zeros.get(), 0};
    if (!dc) call.dc = {zeros.get(), 0};
    const int64_t traffic =
        call.rows * call.features * (9 * element_bytes(call.z_dtype) + 3 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const bool sums = gradients.affine || gradients.z_bias;
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
        const int64_t blocks = isa.feature_blocks(call);
        const int64_t block_grain =
            std::max<int64_t>(1, grain_elements / (16 * 12 * std::max<int64_t>(chunks.count, 1)));
        torch::stable::parallel_for(0, blocks, block_grain, [&](int64_t begin, int64_t end) {
            isa.reduce(call, partials.get(), chunks.count, begin, end);
        });
    }
    return gradients.outputs();
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def(
        "gates_forward(Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, Tensor? seed, "
        "int norm, int activation, float eps, float dropout_p) -> (Tensor h, Tensor c_out)");
    m.def(
        "gates_backward(Tensor? dh, Tensor? dc, Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, "
        "Tensor? bias, "
        "Tensor? seed, int norm, int activation, float eps, float dropout_p, bool affine_gradient, bool "
        "z_bias_gradient) "
        "-> (Tensor dz, Tensor dhidden, Tensor dc_in, Tensor dweight, Tensor dbias, Tensor dz_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("gates_forward", TORCH_BOX(&depthlstm::gates_forward));
    m.impl("gates_backward", TORCH_BOX(&depthlstm::gates_backward));
}
