// The CPU operators of siamese_step, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp the
// arithmetic.
#include <cstdlib>
#include <cstring>

#include "common/torch/companions.h"
#include "common/torch/parallel.h"
#include "common/torch/scratch.h"
#include "cpu.h"

namespace depthlstm {
namespace {

// Above this traffic no last-level cache of this class keeps the outputs until they are read: see
// csrc/depth_lstm/cpu_op.cpp.
constexpr int64_t stream_bytes = int64_t(32) << 20;

const SiameseStepKernels& kernels() {
    const SiameseStepKernels* chosen = select_siamese_step_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

// The inputs of forward and backward, with the tensors that keep them alive.
struct Operands {
    Companions beside;
    SiameseStepCall call;
    std::optional<RowView> x, y, o;
    OptionalTensor weight[3], bias[3];

    Operands(const Tensor& x_in, const Tensor& y_in, const Tensor& o_in, const OptionalTensor& weight_x,
             const OptionalTensor& bias_x, const OptionalTensor& weight_y, const OptionalTensor& bias_y,
             const OptionalTensor& weight_in, const OptionalTensor& bias_in, double c, int64_t norm, double eps)
        : beside(o_in, "o") {
        STD_TORCH_CHECK(norm == 0 || norm == 1, "norm must be 0 or 1; found ", norm);
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        STD_TORCH_CHECK(c > 0, "c must be above 0; found ", c);
        STD_TORCH_CHECK(weight_x && weight_y, "weight_x and weight_y must be given");
        call.rows = beside.rows();
        call.features = beside.features;
        call.o_dtype = beside.dtype;
        call.stream_dtype = beside.companion_dtype(x_in, "x");
        call.rms = norm == 1;
        call.eps = eps;
        call.c = c;
        x = beside.view(x_in, "x", call.stream_dtype);
        y = beside.view(y_in, "y", call.stream_dtype);
        o = beside.view(o_in, "o", call.o_dtype);
        call.x = x->rows();
        call.y = y->rows();
        call.o = o->rows();
        const OptionalTensor* weights[] = {&weight_x, &weight_y, &weight_in};
        const OptionalTensor* biases[] = {&bias_x, &bias_y, &bias_in};
        Affine* affines[] = {&call.x_norm, &call.y_norm, &call.norm};
        static constexpr const char* weight_names[] = {"weight_x", "weight_y", "weight"};
        static constexpr const char* bias_names[] = {"bias_x", "bias_y", "bias"};
        for (int i = 0; i < 3; ++i) {
            weight[i] = beside.parameter(*weights[i], weight_names[i], call.features, affines[i]->weight);
            bias[i] = beside.parameter(*biases[i], bias_names[i], call.features, affines[i]->bias);
            STD_TORCH_CHECK(weight[i] || !bias[i], weight_names[i], " must be given with ", bias_names[i]);
        }
    }

    void set_stream(int64_t stream_rows, int64_t o_rows) {
        const int64_t bytes = stream_rows * element_bytes(call.stream_dtype) + o_rows * element_bytes(call.o_dtype);
        call.stream = bytes * call.rows * call.features > stream_bytes && call.features % 64 == 0;
    }
};

std::tuple<Tensor, Tensor, Tensor> siamese_step_forward(const Tensor& x, const Tensor& y, const Tensor& o,
                                                        const Tensor& weight_x, const OptionalTensor& bias_x,
                                                        const Tensor& weight_y, const OptionalTensor& bias_y,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double c, int64_t norm, double eps) {
    Operands operands(x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias, c, norm, eps);
    SiameseStepCall& call = operands.call;
    Tensor x_out = empty_as(x), y_out = empty_as(y), u = empty_as(o);
    if (call.rows == 0) return {x_out, y_out, u};
    call.x_out = {x_out.mutable_data_ptr(), call.features};
    call.y_out = {y_out.mutable_data_ptr(), call.features};
    call.u = {u.mutable_data_ptr(), call.features};
    operands.set_stream(4, 2);

    const SiameseStepKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    parallel_rows(call.rows, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return {x_out, y_out, u};
}

// dx_out, dy_out and du may be None for zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> siamese_step_backward(
    const OptionalTensor& dx_out, const OptionalTensor& dy_out, const OptionalTensor& du, const Tensor& x,
    const Tensor& y, const Tensor& o, const Tensor& weight_x, const OptionalTensor& bias_x, const Tensor& weight_y,
    const OptionalTensor& bias_y, const OptionalTensor& weight, const OptionalTensor& bias, double c, int64_t norm,
    double eps, bool parameter_gradients) {
    Operands operands(x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias, c, norm, eps);
    SiameseStepCall& call = operands.call;
    Scratch zeros(call.features * 8);  // one row, which every row reads
    std::memset(zeros.get(), 0, std::size_t(call.features) * 8);
    std::optional<RowView> views[3];
    const auto rows_of = [&](int at, const OptionalTensor& tensor, const char* argument, DType dtype) {
        if (!tensor) return ConstRows{zeros.get(), 0};
        views[at] = operands.beside.view(*tensor, argument, dtype);
        return views[at]->rows();
    };
    call.dx_out = rows_of(0, dx_out, "dx_out", call.stream_dtype);
    call.dy_out = rows_of(1, dy_out, "dy_out", call.stream_dtype);
    call.du = rows_of(2, du, "du", call.o_dtype);
    Tensor dx = empty_as(x), dy = empty_as(y), d_o = empty_as(o);
    call.dx = {dx.mutable_data_ptr(), call.features};
    call.dy = {dy.mutable_data_ptr(), call.features};
    call.d_o = {d_o.mutable_data_ptr(), call.features};
    const auto gradient = [&](const OptionalTensor& tensor, Parameter& parameter) {
        return gradient_of(tensor, parameter_gradients, o, parameter);
    };
    Tensor dweight_x = gradient(weight_x, call.x_norm.weight), dbias_x = gradient(bias_x, call.x_norm.bias);
    Tensor dweight_y = gradient(weight_y, call.y_norm.weight), dbias_y = gradient(bias_y, call.y_norm.bias);
    Tensor dweight = gradient(weight, call.norm.weight), dbias = gradient(bias, call.norm.bias);
    operands.set_stream(6, 3);

    const SiameseStepKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const Chunks chunks(call.rows);
    const int64_t partial_bytes = isa.partial_bytes(call);
    Scratch partials(parameter_gradients ? chunks.count * partial_bytes : 0);
    parallel_chunks(chunks, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        Scratch unwanted(parameter_gradients ? 0 : partial_bytes);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            void* partial =
                parameter_gradients ? static_cast<char*>(partials.get()) + chunk * partial_bytes : unwanted.get();
            isa.backward(call, packed.get(), scratch.get(), partial, chunks.begin(chunk), chunks.end(chunk));
        }
    });
    if (parameter_gradients) {
        const int64_t blocks = isa.feature_blocks(call);
        const int64_t block_grain =
            std::max<int64_t>(1, grain_elements / (16 * 6 * std::max<int64_t>(chunks.count, 1)));
        torch::stable::parallel_for(0, blocks, block_grain, [&](int64_t begin, int64_t end) {
            isa.reduce(call, partials.get(), chunks.count, begin, end);
        });
    }
    return {dx, dy, d_o, dweight_x, dbias_x, dweight_y, dbias_y, dweight, dbias};
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def(
        "siamese_step_forward(Tensor x, Tensor y, Tensor o, Tensor weight_x, Tensor? bias_x, Tensor weight_y, Tensor? "
        "bias_y, Tensor? weight, Tensor? bias, float c, int norm, float eps) -> (Tensor x_out, Tensor y_out, Tensor "
        "u)");
    m.def(
        "siamese_step_backward(Tensor? dx_out, Tensor? dy_out, Tensor? du, Tensor x, Tensor y, Tensor o, Tensor "
        "weight_x, Tensor? bias_x, Tensor weight_y, Tensor? bias_y, Tensor? weight, Tensor? bias, float c, int norm, "
        "float eps, bool parameter_gradients) -> (Tensor dx, Tensor dy, Tensor do, Tensor dweight_x, Tensor dbias_x, "
        "Tensor dweight_y, Tensor dbias_y, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("siamese_step_forward", TORCH_BOX(&depthlstm::siamese_step_forward));
    m.impl("siamese_step_backward", TORCH_BOX(&depthlstm::siamese_step_backward));
}
