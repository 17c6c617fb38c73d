// The operators torch sees, over libtorch's stable ABI: shapes, strides, memory and threads; the arithmetic is in csrc/cpu.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/gates.h"

#ifndef DEPTHLSTM_BUILD_INFO
#define DEPTHLSTM_BUILD_INFO "unknown"
#endif

namespace depthlstm {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows that one thread takes at least: below about this many elements waking a second thread costs more than it saves.
constexpr int64_t grain_elements = 16384;
// Rows are cut into chunks by their number alone, never by the threads, so that parameter gradients are bitwise repeatable.
constexpr int64_t max_chunks = 64, min_chunk_rows = 32;
// Above this traffic no last-level cache of this class keeps the outputs until they are read, and they are written past the
// caches: stand-alone, best of 15 on a noisy host, N=4096, D=512 backward 4.6 -> 3.4 ms (fp32), 3.4 -> 2.8 ms (bf16), forward 2.2 -> 1.9 ms (fp32). The forward pass of
// 16-bit types keeps ordinary stores: its half-line writes come out slower that way (1.4 -> 1.6 ms).
constexpr int64_t stream_bytes = int64_t(32) << 20;

int32_t dtype_code(const Tensor& tensor) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    return code;
}

DType dtype_of(const Tensor& tensor, const char* argument) {
    static const int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), bfloat16 = aoti_torch_dtype_bfloat16(),
                         float16 = aoti_torch_dtype_float16();
    const int32_t code = dtype_code(tensor);
    if (code == float32) return DType::float32;
    if (code == float64) return DType::float64;
    if (code == bfloat16) return DType::bfloat16;
    STD_TORCH_CHECK(code == float16, argument, " must be float32, float64, bfloat16 or float16");
    return DType::float16;
}

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Fresh outputs of this size come from mmap, and their page faults cost more than the kernel: huge pages make them few.
// (N=4096, D=512, fp32 backward, noisy host: 16.5 ms before, 4.8 ms with torch's own THP_MEM_ALLOC_ENABLE=1, 5 to 13 ms with this.)
constexpr int64_t huge_bytes = int64_t(4) << 20;

void use_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    if (bytes < huge_bytes) return;
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + uintptr_t(bytes)) / page * page;
    // advice only: where the kernel knows no huge pages nothing changes
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Tensor empty(const int64_t* sizes, int64_t dims, int32_t dtype) {
    int64_t strides[64];
    STD_TORCH_CHECK(dims <= 64, "at most 64 dimensions are supported; found ", dims);
    int64_t stride = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    Tensor tensor(handle);
    use_huge_pages(tensor, tensor.numel() * element_bytes(dtype_of(tensor, "output")));
    return tensor;
}

Tensor empty_as(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return empty(sizes.data(), int64_t(sizes.size()), dtype_code(tensor));
}

Tensor absent(const Tensor& like) {
    const int64_t zero = 0;
    return empty(&zero, 1, dtype_code(like));
}

// A tensor (..., width) as rows that lie one stride apart; copied only where no single stride exists.
struct RowView {
    Tensor tensor;
    int64_t stride;
};

std::optional<int64_t> row_stride(const Tensor& tensor, int64_t width) {
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

RowView as_rows(const Tensor& tensor, int64_t width, const char* argument, const Tensor& c, DType dtype) {
    const auto sizes = tensor.sizes();
    const auto wanted = c.sizes();
    bool matches = sizes.size() == wanted.size() && sizes[sizes.size() - 1] == width && tensor.is_cpu();
    for (std::size_t i = 0; matches && i + 1 < sizes.size(); ++i) matches = sizes[i] == wanted[i];
    STD_TORCH_CHECK(matches, argument, " must be a CPU tensor with the leading shape of c and a last dimension of ", width);
    STD_TORCH_CHECK(dtype_of(tensor, argument) == dtype, argument, " has another dtype than the tensors it belongs to");
    if (const auto stride = row_stride(tensor, width)) return {tensor, *stride};
    return {torch::stable::contiguous(tensor), width};
}

// Small per-feature parameters: contiguous, and of a type that the kernels read.
Tensor parameter(const Tensor& tensor, int64_t elements, const char* argument, DType z_dtype) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == elements, argument, " must be a CPU tensor of ", elements, " elements; found ",
                    tensor.numel());
    const DType dtype = dtype_of(tensor, argument);
    STD_TORCH_CHECK(dtype == z_dtype || (dtype == DType::float32 && z_dtype != DType::float64), argument,
                    " must have the dtype of z, or float32 beside a 16-bit z");
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

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

// What forward and backward read alike, with the tensors that keep it alive.
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
            STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && dtype_code(*seed) == aoti_torch_dtype_int64(),
                            "seed must be a CPU int64 tensor of one element");
            call.dropout_p = dropout_p;
            call.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
        }
        z = as_rows(z_in, z_width, "z", c_in, call.z_dtype);
        c = as_rows(c_in, features, "c", c_in, call.c_dtype);
        call.z = {z.tensor.const_data_ptr(), z.stride};
        call.c = {c.tensor.const_data_ptr(), c.stride};
        if (hidden_in) {
            hidden = as_rows(*hidden_in, features, "hidden", c_in, call.z_dtype);
            call.hidden = {hidden->tensor.const_data_ptr(), hidden->stride};
        }
        if (z_bias_in) {
            z_bias = parameter(*z_bias_in, z_width, "z_bias", call.z_dtype);
            call.z_bias = z_bias->const_data_ptr();
            call.z_bias_dtype = dtype_of(*z_bias, "z_bias");
        }
        STD_TORCH_CHECK(weight_in.has_value() == bias_in.has_value(), "weight and bias must both be given or both be None");
        if (weight_in) {
            STD_TORCH_CHECK(call.norm != Norm::none, "weight and bias must be None with norm none");
            weight = parameter(*weight_in, z_width, "weight", call.z_dtype);
            bias = parameter(*bias_in, z_width, "bias", call.z_dtype);
            call.weight = weight->const_data_ptr();
            call.bias = bias->const_data_ptr();
            call.affine_dtype = dtype_of(*weight, "weight");
            STD_TORCH_CHECK(dtype_of(*bias, "bias") == call.affine_dtype, "bias must have the dtype of weight");
        }
    }

    int64_t grain() const { return std::max<int64_t>(1, grain_elements / call.features); }
};

std::tuple<Tensor, Tensor> gates_forward(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden, const Tensor& c,
                                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed, int64_t norm,
                                         int64_t activation, double eps, double dropout_p) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    const auto sizes = c.sizes();
    Tensor h = empty(sizes.data(), int64_t(sizes.size()), dtype_code(z));
    Tensor c_out = empty_as(c);
    if (call.rows == 0) return {h, c_out};
    call.h = {h.mutable_data_ptr(), call.features};
    call.c_out = {c_out.mutable_data_ptr(), call.features};
    const int64_t traffic = call.rows * call.features * (5 * element_bytes(call.z_dtype) + 2 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0 && element_bytes(call.z_dtype) > 2;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    torch::stable::parallel_for(0, call.rows, inputs.grain(), [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return {h, c_out};
}

// dh or dc may be None for zeros. Gradients that were not asked for, or have no input, come back with no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gates_backward(
    const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden,
    const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed, int64_t norm, int64_t activation,
    double eps, double dropout_p, bool affine_gradient, bool z_bias_gradient) {
    Inputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    GatesCall& call = inputs.call;
    std::optional<RowView> dh_rows, dc_rows;
    Scratch zeros(dh && dc ? 0 : call.features * 8);  // one row, read at every row
    if (!dh || !dc) std::memset(zeros.get(), 0, std::size_t(call.features) * 8);
    call.dh = call.dc = {zeros.get(), 0};
    if (dh) {
        dh_rows = as_rows(*dh, call.features, "dh", c, call.z_dtype);
        call.dh = {dh_rows->tensor.const_data_ptr(), dh_rows->stride};
    }
    if (dc) {
        dc_rows = as_rows(*dc, call.features, "dc", c, call.c_dtype);
        call.dc = {dc_rows->tensor.const_data_ptr(), dc_rows->stride};
    }
    Tensor dz = empty_as(z);
    Tensor dhidden = hidden ? empty_as(*hidden) : absent(z);
    Tensor dc_in = empty_as(c);
    affine_gradient = affine_gradient && weight;
    z_bias_gradient = z_bias_gradient && z_bias;
    Tensor dweight = affine_gradient ? empty_as(*weight) : absent(z);
    Tensor dbias = affine_gradient ? empty_as(*bias) : absent(z);
    Tensor dz_bias = z_bias_gradient ? empty_as(*z_bias) : absent(z);
    call.dz = {dz.mutable_data_ptr(), inputs.z_width};
    call.dc_in = {dc_in.mutable_data_ptr(), call.features};
    if (hidden) call.dhidden = {dhidden.mutable_data_ptr(), call.features};
    if (affine_gradient) call.dweight = dweight.mutable_data_ptr(), call.dbias = dbias.mutable_data_ptr();
    if (z_bias_gradient) call.dz_bias = dz_bias.mutable_data_ptr();
    const int64_t traffic = call.rows * call.features * (9 * element_bytes(call.z_dtype) + 3 * element_bytes(call.c_dtype));
    call.stream = traffic > stream_bytes && call.features % 64 == 0;

    const GatesKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const bool sums = affine_gradient || z_bias_gradient;
    const int64_t chunk_rows = std::max(min_chunk_rows, (call.rows + max_chunks - 1) / max_chunks);
    const int64_t chunks = (call.rows + chunk_rows - 1) / chunk_rows;
    const int64_t partial_bytes = isa.partial_bytes(call);
    Scratch partials(sums ? chunks * partial_bytes : 0);
    const int64_t grain = std::max<int64_t>(1, inputs.grain() / chunk_rows);
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
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
    return {dz, dhidden, dc_in, dweight, dbias, dz_bias};
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
