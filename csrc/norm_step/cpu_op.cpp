// The CPU operators of norm_step, over libtorch's stable ABI. This file has memory and threads, cpu_kernel.cpp the
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

const NormStepKernels& kernels() {
    const NormStepKernels* chosen = select_norm_step_kernels();
    STD_TORCH_CHECK(chosen != nullptr,
                    "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have "
                    "them; found ",
                    std::getenv("DEPTHLSTM_CPU_ISA"));
    return *chosen;
}

// The parameters and numbers of forward and backward, with the tensors that keep them alive.
struct Operands {
    Companions beside;
    NormStepCall call;
    OptionalTensor scale, weight[3], bias[3];

    Operands(const Tensor& y, const char* name, const OptionalTensor& scale_in, const OptionalTensor& weight1,
             const OptionalTensor& bias1, const OptionalTensor& weight2, const OptionalTensor& bias2,
             const OptionalTensor& weight3, const OptionalTensor& bias3, double a, double b, int64_t norm, double eps)
        : beside(y, name) {
        STD_TORCH_CHECK(norm == 0 || norm == 1, "norm must be 0 or 1; found ", norm);
        STD_TORCH_CHECK(eps >= 0, "eps must not be negative; found ", eps);
        call.rows = beside.rows();
        call.features = beside.features;
        call.y_dtype = call.x_dtype = beside.dtype;
        call.rms = norm == 1;
        call.eps = eps;
        call.a = a;
        call.b = b;
        if (scale_in) {
            call.one_scale = scale_in->dim() == 0;
            scale = beside.parameter(scale_in, "scale", call.one_scale ? 1 : call.features, call.scale);
        }
        const OptionalTensor* weights[] = {&weight1, &weight2, &weight3};
        const OptionalTensor* biases[] = {&bias1, &bias2, &bias3};
        static constexpr const char* weight_names[] = {"weight1", "weight2", "weight3"};
        static constexpr const char* bias_names[] = {"bias1", "bias2", "bias3"};
        for (int i = 0; i < 3; ++i) {
            weight[i] = beside.parameter(*weights[i], weight_names[i], call.features, call.norm[i].weight);
            bias[i] = beside.parameter(*biases[i], bias_names[i], call.features, call.norm[i].bias);
            STD_TORCH_CHECK(weight[i] || !bias[i], weight_names[i], " must be given with ", bias_names[i]);
        }
    }

    void set_stream(int64_t x_rows, int64_t y_rows) {
        const int64_t bytes = x_rows * element_bytes(call.x_dtype) + y_rows * element_bytes(call.y_dtype);
        call.stream = bytes * call.rows * call.features > stream_bytes && call.features % 64 == 0;
    }
};

std::tuple<Tensor, Tensor> norm_step_forward(const Tensor& x, const Tensor& y, const OptionalTensor& scale,
                                             const OptionalTensor& weight1, const OptionalTensor& bias1,
                                             const OptionalTensor& weight2, const OptionalTensor& bias2,
                                             const OptionalTensor& weight3, const OptionalTensor& bias3, double a,
                                             double b, int64_t norm, double eps) {
    Operands operands(y, "y", scale, weight1, bias1, weight2, bias2, weight3, bias3, a, b, norm, eps);
    NormStepCall& call = operands.call;
    call.x_dtype = operands.beside.companion_dtype(x, "x");
    const RowView x_rows = operands.beside.view(x, "x", call.x_dtype);
    const RowView y_rows = operands.beside.view(y, "y", call.y_dtype);
    Tensor x_out = empty_as(x);
    Tensor u = call.norm[1].there() ? empty_as(y) : absent(y);
    if (call.rows == 0) return {x_out, u};
    call.x = x_rows.rows();
    call.y = y_rows.rows();
    call.x_out = {x_out.mutable_data_ptr(), call.features};
    if (call.norm[1].there()) call.u = {u.mutable_data_ptr(), call.features};
    operands.set_stream(2, call.norm[1].there() ? 2 : 1);

    const NormStepKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    parallel_rows(call.rows, call.features, [&](int64_t begin, int64_t end) {
        Scratch scratch(isa.scratch_bytes(call));
        isa.forward(call, packed.get(), scratch.get(), begin, end);
    });
    return {x_out, u};
}

// x, y and x_out are those that a placement needs: x with N1, y with N1, N3 or scale, x_out with N2 and without N1. du
// belongs to N2. dx_out may be None for zeros beside du. dy has no elements where it equals dx.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_step_backward(
    const OptionalTensor& dx_out, const OptionalTensor& du, const OptionalTensor& x, const OptionalTensor& y,
    const OptionalTensor& x_out, const OptionalTensor& scale, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& weight3, const OptionalTensor& bias3, double a, double b, int64_t norm, double eps,
    bool parameter_gradients) {
    STD_TORCH_CHECK(weight1 || weight2 || weight3 || scale, "weight1, weight2, weight3 or scale must be given");
    STD_TORCH_CHECK(du.has_value() == weight2.has_value(), "du must be given with weight2, and None without it");
    STD_TORCH_CHECK(dx_out || du, "dx_out or du must be given");
    STD_TORCH_CHECK(!weight1 || (x && y), "x and y must be given with weight1");
    STD_TORCH_CHECK((!weight3 && !scale) || y, "y must be given with weight3 or scale");
    STD_TORCH_CHECK(!weight2 || weight1 || x_out, "x_out must be given with weight2 and without weight1");
    const Tensor& like = y ? *y : *du;
    Operands operands(like, y ? "y" : "du", scale, weight1, bias1, weight2, bias2, weight3, bias3, a, b, norm, eps);
    NormStepCall& call = operands.call;
    const Companions& beside = operands.beside;
    const Tensor& x_like = weight1 ? *x : weight2 ? *x_out : *dx_out;
    call.x_dtype = beside.companion_dtype(x_like, "the stream");
    std::optional<RowView> views[5];
    const auto rows_of = [&](int at, const OptionalTensor& tensor, bool used, const char* argument, DType dtype) {
        if (!tensor || !used) return ConstRows{};
        views[at] = beside.view(*tensor, argument, dtype);
        return views[at]->rows();
    };
    call.x = rows_of(0, x, weight1.has_value(), "x", call.x_dtype);
    call.y = rows_of(1, y, true, "y", call.y_dtype);
    call.x_out_read = rows_of(2, x_out, weight2 && !weight1, "x_out", call.x_dtype);
    call.dx_out = rows_of(3, dx_out, true, "dx_out", call.x_dtype);
    call.du = rows_of(4, du, true, "du", call.y_dtype);

    const bool shared = a == 1 && b == 1 && !scale && !weight3 && call.x_dtype == call.y_dtype;
    Tensor dx = empty_as(like, dtype_code(x_like));
    Tensor dy = shared ? absent(like) : empty_as(like);
    Tensor dscale = gradient_of(scale, parameter_gradients, like, call.scale);
    const OptionalTensor* affine[] = {&weight1, &bias1, &weight2, &bias2, &weight3, &bias3};
    std::optional<Tensor> sums[6];
    for (int i = 0; i < 6; ++i) {
        Affine& of = call.norm[i / 2];
        sums[i] = gradient_of(*affine[i], parameter_gradients, like, i % 2 == 0 ? of.weight : of.bias);
    }
    call.dx = {dx.mutable_data_ptr(), call.features};
    if (!shared) call.dy = {dy.mutable_data_ptr(), call.features};
    Scratch zeros(dx_out ? 0 : call.features * 8);  // one row, which every row reads
    if (!dx_out) {
        std::memset(zeros.get(), 0, std::size_t(call.features) * 8);
        call.dx_out = {zeros.get(), 0};
    }
    operands.set_stream(3, 3);

    const NormStepKernels& isa = kernels();
    Scratch packed(isa.packed_bytes(call));
    isa.pack(call, packed.get());
    const Chunks chunks(call.rows);
    const int64_t partial_bytes = isa.partial_bytes(call);
    Scratch partials((parameter_gradients ? chunks.count : 1) * partial_bytes);
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
            std::max<int64_t>(1, grain_elements / (16 * 7 * std::max<int64_t>(chunks.count, 1)));
        torch::stable::parallel_for(0, blocks, block_grain, [&](int64_t begin, int64_t end) {
            isa.reduce(call, partials.get(), chunks.count, begin, end);
        });
    }
    return {dx, dy, dscale, *sums[0], *sums[1], *sums[2], *sums[3], *sums[4], *sums[5]};
}

}  // namespace
}  // namespace depthlstm

STABLE_TORCH_LIBRARY_FRAGMENT(depthlstm_fast, m) {
    m.def(
        "norm_step_forward(Tensor x, Tensor y, Tensor? scale, Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? "
        "bias2, Tensor? weight3, Tensor? bias3, float a, float b, int norm, float eps) -> (Tensor x_out, Tensor u)");
    m.def(
        "norm_step_backward(Tensor? dx_out, Tensor? du, Tensor? x, Tensor? y, Tensor? x_out, Tensor? scale, Tensor? "
        "weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor? weight3, Tensor? bias3, float a, float b, int "
        "norm, float eps, bool parameter_gradients) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor dweight1, Tensor "
        "dbias1, Tensor dweight2, Tensor dbias2, Tensor dweight3, Tensor dbias3)");
}

STABLE_TORCH_LIBRARY_IMPL(depthlstm_fast, CPU, m) {
    m.impl("norm_step_forward", TORCH_BOX(&depthlstm::norm_step_forward));
    m.impl("norm_step_backward", TORCH_BOX(&depthlstm::norm_step_backward));
}
