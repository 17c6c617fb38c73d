// The CUDA operators that torch sees, over libtorch's stable ABI: memory, the current stream, errors. The kernels are
// in cuda_*_kernel.cu.
//
// With DEPTHLSTM_SIMULATED=<namespace> the same operators take CPU tensors, in that namespace. The tests link them to
// kernels that are simulated on a CPU.
#if !defined(DEPTHLSTM_SIMULATED)
#include <dlfcn.h>
#endif

#include "cuda.h"
#include "operands.h"

namespace depthlstm {
namespace {

// cudaError_t values for a library without code for the GPU and driver.
constexpr int invalid_device_function = 98, no_kernel_image = 209, unsupported_ptx = 222;
constexpr uintptr_t workspace_alignment = 256;

#if defined(DEPTHLSTM_SIMULATED)
bool is_ours(const Tensor& tensor) { return tensor.is_cpu(); }

void* current_stream(int32_t) { return nullptr; }
#else
bool is_ours(const Tensor& tensor) { return tensor.is_cuda(); }

// Looks up libtorch_cuda.so where torch has loaded it. A library linked to it would not load on a torch without CUDA.
void* current_stream(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto ask = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
        return library == nullptr ? nullptr
                                  : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(ask != nullptr,
                    "this torch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream: it is no CUDA build");
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(ask(device, &stream));
    return stream;
}
#endif

void check_error(int error, const char* what) {
    if (error == 0) return;
    const bool no_code = error == invalid_device_function || error == no_kernel_image || error == unsupported_ptx;
    STD_TORCH_CHECK(!no_code, what, ": ", depthlstm_cuda_error(error), " (CUDA error ", error,
                    "). This library holds code for " DEPTHLSTM_CUDA_ARCHS
                    "; for another GPU, or a driver too old for its PTX, build it from source with "
                    "DEPTHLSTM_CUDA_ARCHS set to the GPU's "
                    "compute capability, as in DEPTHLSTM_CUDA_ARCHS=86");
    STD_TORCH_CHECK(false, what, ": ", depthlstm_cuda_error(error), " (CUDA error ", error, ")");
}

struct CudaInputs : Inputs {
    CudaCall cuda;

    CudaInputs(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden, const Tensor& c,
               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed, int64_t norm,
               int64_t activation, double eps, double dropout_p)
        : Inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p) {
        STD_TORCH_CHECK(is_ours(c), "c must be a CUDA tensor, as every tensor beside it");
        STD_TORCH_CHECK(call.z_dtype != DType::float64,
                        "z must be float32, bfloat16 or float16: the CUDA kernels have no float64");
        if (seed) cuda.seed = static_cast<const uint64_t*>(seed->const_data_ptr());
        cuda.device = std::max(0, device_of(c).index);  // a CPU has index -1
    }

    // Returns the finished call. Tensors that live until the call returns may be freed then, because the allocator
    // gives their memory only to later work on this stream.
    const CudaCall* finish() {
        cuda.gates = call;
        cuda.stream = current_stream(cuda.device);
        return &cuda;
    }
};

Tensor forward_into(CudaInputs& inputs, const Tensor& c, Rows h) {
    Tensor c_out = empty_as(c);
    if (inputs.call.rows == 0) return c_out;
    inputs.call.h = h;
    inputs.call.c_out = {c_out.mutable_data_ptr(), inputs.call.features};
    check_error(depthlstm_cuda_gates_forward(inputs.finish()), "cuda_gates_forward");
    return c_out;
}

std::tuple<Tensor, Tensor> gates_forward(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden,
                                         const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& seed, int64_t norm, int64_t activation, double eps,
                                         double dropout_p) {
    CudaInputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    Tensor h = empty_as(c, dtype_code(z));
    Tensor c_out = forward_into(inputs, c, {h.mutable_data_ptr(), inputs.call.features});
    return {h, c_out};
}

// Takes z + z_more in place of z if z_more is given. h is written into a tensor whose rows lie one stride apart.
Tensor gates_forward_into(const Tensor& z, const OptionalTensor& z_bias, const OptionalTensor& hidden, const Tensor& c,
                          const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
                          int64_t norm, int64_t activation, double eps, double dropout_p, const OptionalTensor& z_more,
                          Tensor h) {
    CudaInputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    const GatesCall& call = inputs.call;
    std::optional<RowView> more;
    if (z_more) {
        more = as_rows(*z_more, inputs.z_width, "z_more", c, call.z_dtype);
        inputs.cuda.z_more = more->rows();
    }
    check_rows(h, call.features, "h", c, call.z_dtype);
    const auto stride = row_stride(h, call.features);
    STD_TORCH_CHECK(stride && (call.rows <= 1 || *stride >= call.features),
                    "h must have rows that lie one stride apart and do not overlap");
    return forward_into(inputs, c, {h.mutable_data_ptr(), *stride});
}

// dh or dc may be None for zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gates_backward(
    const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& z, const OptionalTensor& z_bias,
    const OptionalTensor& hidden, const Tensor& c, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& seed, int64_t norm, int64_t activation, double eps, double dropout_p, bool affine_gradient,
    bool z_bias_gradient) {
    CudaInputs inputs(z, z_bias, hidden, c, weight, bias, seed, norm, activation, eps, dropout_p);
    Gradients gradients(inputs.call, dh, dc, z, z_bias, hidden, c, weight, bias, affine_gradient, z_bias_gradient);
    if (inputs.call.rows == 0) {  // the sums over no rows are zero
        for (Tensor* sum : {&gradients.dweight, &gradients.dbias, &gradients.dz_bias}) torch::stable::zero_(*sum);
        return gradients.outputs();
    }
    inputs.finish();
    const int64_t bytes = depthlstm_cuda_workspace_bytes(&inputs.cuda);
    if (bytes < 0) check_error(int(-bytes), "cuda_gates_backward");
    const int64_t size = bytes + int64_t(workspace_alignment);
    const Tensor workspace = empty(&size, 1, aoti_torch_dtype_uint8(), device_of(c));
    const uintptr_t place = reinterpret_cast<uintptr_t>(workspace.data_ptr());
    inputs.cuda.workspace =
        reinterpret_cast<void*>((place + workspace_alignment - 1) / workspace_alignment * workspace_alignment);
    check_error(depthlstm_cuda_gates_backward(&inputs.cuda), "cuda_gates_backward");
    return gradients.outputs();
}

}  // namespace
}  // namespace depthlstm

#if defined(DEPTHLSTM_SIMULATED)
#define DEPTHLSTM_NAMESPACE DEPTHLSTM_SIMULATED
#define DEPTHLSTM_KEY CPU
#else
#define DEPTHLSTM_NAMESPACE depthlstm_fast
#define DEPTHLSTM_KEY CUDA
#endif

#define DEPTHLSTM_INPUTS                                                                                             \
    "Tensor z, Tensor? z_bias, Tensor? hidden, Tensor c, Tensor? weight, Tensor? bias, Tensor? seed, int norm, int " \
    "activation, "                                                                                                   \
    "float eps, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(DEPTHLSTM_NAMESPACE, m) {
    m.def("cuda_gates_forward(" DEPTHLSTM_INPUTS ") -> (Tensor h, Tensor c_out)");
    m.def("cuda_gates_forward_into(" DEPTHLSTM_INPUTS ", Tensor? z_more, Tensor(a!) h) -> Tensor c_out");
    m.def("cuda_gates_backward(Tensor? dh, Tensor? dc, " DEPTHLSTM_INPUTS
          ", bool affine_gradient, bool z_bias_gradient) "
          "-> (Tensor dz, Tensor dhidden, Tensor dc_in, Tensor dweight, Tensor dbias, Tensor dz_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(DEPTHLSTM_NAMESPACE, DEPTHLSTM_KEY, m) {
    m.impl("cuda_gates_forward", TORCH_BOX(&depthlstm::gates_forward));
    m.impl("cuda_gates_forward_into", TORCH_BOX(&depthlstm::gates_forward_into));
    m.impl("cuda_gates_backward", TORCH_BOX(&depthlstm::gates_backward));
}
