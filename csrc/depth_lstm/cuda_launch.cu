// The C functions of cuda.h, and the sums of the parameter gradients. Each function passes a call to the kernels of its
// dtype, on its device.
#include "cuda_gates.cuh"
#include "cuda_kernels.h"

namespace depthlstm {
namespace {

constexpr int sum_columns = 32, sum_groups = 16;

// One parameter gradient that sums_kernel writes; null if it is not wanted.
struct SumsOutput {
    void* data[3];
    DType dtype[3];
};

__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t index, float value) {
    switch (dtype) {
        case DType::bfloat16: static_cast<bfloat16*>(data)[index] = from_float<bfloat16>(value); break;
        case DType::float16: static_cast<float16*>(data)[index] = from_float<float16>(value); break;
        default: static_cast<float*>(data)[index] = value;
    }
}

// Sums partial (programs, columns) over the programs. A thread adds every 16th, then one thread a column adds these 16,
// in their order.
__global__ void __launch_bounds__(sum_columns* sum_groups)
    sums_kernel(const float* __restrict__ partial, int64_t programs, int64_t columns, int64_t width,
                const __grid_constant__ SumsOutput output) {
    __shared__ float sums[sum_groups][sum_columns];
    const int lane = threadIdx.x % sum_columns, group = threadIdx.x / sum_columns;
    const int64_t column = int64_t(blockIdx.x) * sum_columns + lane;
    float sum = 0.f;
    if (column < columns) {
#pragma unroll 8
        for (int64_t program = group; program < programs; program += sum_groups)
            sum += partial[program * columns + column];
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group != 0 || column >= columns) return;
    for (int i = 1; i < sum_groups; ++i) sum += sums[i][lane];
    const int which = int(column / width);
    store_as(output.data[which], output.dtype[which], column % width, sum);
}

Launch launch_of(const CudaCall& call) {
    Launch launch{call.gates, call.z_more, call.seed, float(call.gates.eps), 1.f, 0, nullptr, nullptr};
    if (call.seed != nullptr) {
        launch.dropout_threshold = uint32_t(call.gates.dropout_p * 4294967296.0);
        launch.dropout_scale = float(1.0 / (1.0 - call.gates.dropout_p));
    }
    return launch;
}

// Runs `body(launch, device)` on the call's device.
template <class Body>
cudaError_t on_device(const CudaCall& call, const Body& body) {
    if (call.gates.rows == 0) return cudaSuccess;
    // the kernels would take another code for the identity
    const bool known = call.gates.activation >= Activation(0) && call.gates.activation < Activation::given;
    if (call.gates.hidden.data == nullptr && !known) return cudaErrorInvalidValue;
    const CurrentDevice current(call.device);
    GpuDevice device;
    if (current.error() != cudaSuccess) return current.error();
    const cudaError_t error = describe(call.device, call.stream, &device);
    if (error != cudaSuccess) return error;
    Launch launch = launch_of(call);
    return body(launch, device);
}

cudaError_t backward(const CudaCall& call, int64_t* workspace_bytes) {
    return on_device(call, [&](Launch& launch, const GpuDevice& device) {
        switch (call.gates.z_dtype) {
            case DType::float32: return backward_float(launch, device, call.workspace, workspace_bytes);
            case DType::bfloat16: return backward_bfloat16(launch, device, call.workspace, workspace_bytes);
            case DType::float16: return backward_float16(launch, device, call.workspace, workspace_bytes);
            default: return cudaErrorInvalidValue;
        }
    });
}

}  // namespace

cudaError_t sum_partials(const Launch& launch, int64_t programs, cudaStream_t stream) {
    const GatesCall& call = launch.call;
    const int64_t width = (call.hidden.data != nullptr ? 3 : 4) * call.features;
    SumsOutput output{};
    int count = 0;
    const auto add = [&](void* data, DType dtype) {
        if (data == nullptr) return;
        output.data[count] = data;
        output.dtype[count++] = dtype;
    };
    add(call.dweight, call.affine_dtype);
    add(call.dbias, call.affine_dtype);
    add(call.dz_bias, call.z_bias_dtype);
    const int64_t columns = count * width;
    const unsigned blocks = unsigned((columns + sum_columns - 1) / sum_columns);
    sums_kernel<<<blocks, sum_columns * sum_groups, 0, stream>>>(launch.partial, programs, columns, width, output);
    return cudaGetLastError();
}

}  // namespace depthlstm

extern "C" int depthlstm_cuda_gates_forward(const depthlstm::CudaCall* call) {
    using namespace depthlstm;
    return on_device(*call, [&](Launch& launch, const GpuDevice& device) {
        switch (call->gates.z_dtype) {
            case DType::float32: return forward_float(launch, device);
            case DType::bfloat16: return forward_bfloat16(launch, device);
            case DType::float16: return forward_float16(launch, device);
            default: return cudaErrorInvalidValue;
        }
    });
}

extern "C" int depthlstm_cuda_gates_backward(const depthlstm::CudaCall* call) {
    return depthlstm::backward(*call, nullptr);
}

extern "C" int64_t depthlstm_cuda_workspace_bytes(const depthlstm::CudaCall* call) {
    int64_t bytes = 0;
    const cudaError_t error = depthlstm::backward(*call, &bytes);
    return error == cudaSuccess ? bytes : -int64_t(error);
}

extern "C" const char* depthlstm_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
