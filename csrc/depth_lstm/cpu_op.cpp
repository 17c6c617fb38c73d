// The CPU operators torch sees, over libtorch's stable ABI: memory and threads; the arithmetic is in csrc/cpu.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/gates.h"
#include "tensors.h"

#ifndef DEPTHLSTM_BUILD_INFO
#define DEPTHLSTM_BUILD_INFO "unknown"
#endif

namespace depthlstm {
namespace {

// Rows that one thread takes at least: below about this many elements waking a second thread costs more than it saves.
constexpr int64_t grain_elements = 16384;
// Rows are cut into chunks by their number alone, never by the threads, so that parameter gradients are bitwise repeatable.
constexpr int64_t max_chunks = 64, min_chunk_rows = 32;
// Above this traffic no last-level cache of this class keeps the outputs until they are read, and they are written past the
// caches: stand-alone, best of 15 on a noisy host, N=4096, D=512 backward 4.6 -> 3.4 ms (fp32), 3.4 -> 2.8 ms (bf16), forward 2.2 -> 1.9 ms (fp32). The forward pass of
// 16-bit types keeps ordinary stores: its half-line writes come out slower that way (1.4 -> 1.6 ms).
constexpr int64_t stream_bytes = int64_t(32) << 20;

// Working memory: on the stack where it is small, which a call on few features notices (tiny tensors, 2 of 8 us).
class Scratch {
public:
    explicit Scratch(int64_t bytes) {
        if (bytes <= int64_t(sizeof local_)) return;
        // Pages of its own, and one more, to keep two threads' scratch apart: where they lay side by side a stand-alone bf16 forward
        // took 1.9 ms instead of 1.4 ms. The hardware prefetcher is the suspect, not shown; through torch no gain was measured.
        constexpr int64_t page = 4096;
        heap_ = std::aligned_alloc(page, std::size_t((bytes + page - 1) / page + 1) * page);
        STD_TORCH_CHECK(heap_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
    }
    ~Scratch() { std::free(heap_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* get() { return heap_ != nullptr ? heap_ : local_; }

private:
    void* heap_ = nullptr;
    alignas(64) char local_[4096];
};

const GatesKernels& kernels() {
    const GatesKernels* chosen = select_gates_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

int64_t grain(const GatesCall& call) { return std::max<int64_t>(1, grain_elements / call.features); }

// The seed's value for the kernels, which read it from the call.
void set_seed(GatesCall& call, const OptionalTensor& seed) {
    if (seed) call.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
}

std::tuple<Tensor, Tensor> gates_forward(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden, const Tensor& c,
                                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed, int64_t norm,
                                         int64_t activation, double eps, double dropout_p) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    set_seed(call, seed);
    Tensor h = empty_as(c, dtype_code(z));
    Tensor c_out = empty_as(c);
    if (call.rows == 0) return {h, c_out};
    call.h = {h.mutable_data_ptr(), call.features};
    call.c_out = {c_out.mutable_data_ptr(), call.features};
    const int64_t traffic = call.rows * call.features * (5 * element_bytes(call.z_dtype) + 2 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0 && element_bytes(call.z_dtype) > 2;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    torch::stable::parallel_for(0, call.rows, grain(call), [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return {h, c_out};
}

// dh or dc may be None for zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gates_backward(
    const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden,
    const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed, int64_t norm, int64_t activation,
    double eps, double dropout_p, bool affine_gradient, bool z_bias_gradient) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    set_seed(call, seed);
    const Gradients gradients(call, dh, dc, z, z_bias, hidden, c, weight, bias, affine_gradient, z_bias_gradient);
    Scratch zeros(dh && dc ? 0 : call.features * 8);  // one row, read at every row
    if (!dh || !dc) std::memset(zeros.get(), 0, std::size_t(call.features) * 8);
    if (!dh) call.dh = {zeros.get(), 0};
    if (!dc) call.dc = {zeros.get(), 0};
    const int64_t traffic = call.rows * call.features * (9 * element_bytes(call.z_dtype) + 3 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const bool sums = gradients.affine || gradients.z_bias;
    const int64_t chunk_rows = std::max(min_chunk_rows, (call.rows + max_chunks - 1) / max_chunks);
    const int64_t chunks = (call.rows + chunk_rows - 1) / chunk_rows;
    const int64_t partial_bytes = isa.partial_bytes(call);
    Scratch partials(sums ? chunks * partial_bytes : 0);
    const int64_t chunk_grain = std::max<int64_t>(1, grain(call) / chunk_rows);
    torch::stable::parallel_for(0, chunks, chunk_grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            void* partial = sums ? static_cast<char*>(partials.get()) + chunk * partial_bytes : nullptr;
            isa.backward(call, packed.get(), scratch.get(), partial, chunk * chunk_rows, std::min(call.rows, (chunk + 1) * chunk_rows));
        }
    });
    if (sums) {
        const int64_t blocks = isa.feature_blocks(call);
        const int64_t block_grain = std::max<int64_t>(1, grain_elements / (16 * 12 * std::max<int64_t>(chunks, 1)));
        torch::stable::parallel_for(0, blocks, block_grain,
                                    [&](int64_t begin, int64_t end) { isa.reduce(call, partials.get(), chunks, begin, end); });
    }
    return gradients.outputs();
}

}  // namespace
}  // namespace depthlstm

// Read through ctypes by the report command; they must work where the operators do not.
extern "C" __attribute__((visibility("default"))) const char* depthlstm_build_info() { return DEPTHLSTM_BUILD_INFO; }
extern "C" __attribute__((visibility("default"))) const char* depthlstm_cpu_isa() {
    const depthlstm::GatesKernels* chosen = depthlstm::select_gates_kernels();
    return chosen == nullptr ? "" : chosen->isa;
}

STABLE_TORCH_LIBRARY(depthlstm_fast, m) {
    m.def(
        "gates_forward(Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, Tensor? seed, "
        "int norm, int activation, float eps, float dropout_p) -> (Tensor h, Tensor c_out)");
    m.def(
        "gates_backward(Tensor? dh, Tensor? dc, Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, "
        "Tensor? seed, int norm, int activation, float eps, float dropout_p, bool affine_gradient, bool z_bias_gradient) "
        "-> (Tensor dz, Tensor dhidden, Tensor dc_in, Tensor dweight, Tensor dbias, Tensor dz_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("gates_forward", TORCH_BOX(&depthlstm::gates_forward));
    m.impl("gates_backward", TORCH_BOX(&depthlstm::gates_backward));
}
