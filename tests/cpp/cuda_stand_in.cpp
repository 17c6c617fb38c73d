// The C interface of the CUDA kernels on top of the CPU kernels, for the tests of the CUDA operators' binding. It uses
// its workspace to the last byte, and fails on request.
#include <cstring>
#include <utility>
#include <vector>

#include "depth_lstm/cpu.h"
#include "depth_lstm/cuda.h"

using namespace depthlstm;

namespace {

constexpr int invalid_value = 1, not_supported = 801;  // cudaError_t
constexpr int64_t workspace_bytes = 1000;
int next_error = 0;

using Memory = std::vector<char>;

// Memory aligned to 64 bytes, as the CPU kernels need.
void* aligned(Memory& memory, int64_t bytes) {
    memory.assign(std::size_t(bytes) + 64, char(0xff));
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

GatesCall on_cpu(const CudaCall* cuda) {
    GatesCall call = cuda->gates;
    call.stream = false;
    if (cuda->seed != nullptr) call.seed = *cuda->seed;
    return call;
}

}  // namespace

#define DEPTHLSTM_EXPORT extern "C" __attribute__((visibility("default")))

DEPTHLSTM_EXPORT void stand_in_fails(int error) { next_error = error; }

DEPTHLSTM_EXPORT const char* depthlstm_cuda_error(int error) {
    return error == not_supported ? "operation not supported" : "as it was told";
}

DEPTHLSTM_EXPORT int64_t depthlstm_cuda_workspace_bytes(const CudaCall*) {
    return next_error < 0 ? std::exchange(next_error, 0) : workspace_bytes;
}

DEPTHLSTM_EXPORT int depthlstm_cuda_gates_forward(const CudaCall* cuda) {
    if (next_error != 0) return std::exchange(next_error, 0);
    GatesCall call = on_cpu(cuda);
    std::vector<float> sum;
    if (cuda->z_more.data != nullptr) {
        if (call.z_dtype != DType::float32) return not_supported;
        const int64_t width = call.features * (call.activation == Activation::given ? 3 : 4);
        for (int64_t row = 0; row < call.rows; ++row) {
            for (int64_t i = 0; i < width; ++i) {
                sum.push_back(static_cast<const float*>(call.z.data)[row * call.z.stride + i] +
                              static_cast<const float*>(cuda->z_more.data)[row * cuda->z_more.stride + i]);
            }
        }
        call.z = {sum.data(), width};
    }
    const GatesKernels& kernels = generic::gates_kernels;
    Memory packed, scratch;
    void* const pack = aligned(packed, kernels.packed_bytes(call));
    kernels.pack(call, pack);
    kernels.forward(call, pack, aligned(scratch, kernels.scratch_bytes(call)), 0, call.rows);
    return 0;
}

DEPTHLSTM_EXPORT int depthlstm_cuda_gates_backward(const CudaCall* cuda) {
    if (next_error != 0) return std::exchange(next_error, 0);
    if (cuda->workspace == nullptr || reinterpret_cast<uintptr_t>(cuda->workspace) % 256 != 0) return invalid_value;
    std::memset(cuda->workspace, 0xff, workspace_bytes);
    GatesCall call = on_cpu(cuda);
    const std::vector<double> zeros(std::size_t(call.features), 0.0);
    for (ConstRows* gradient : {&call.dh, &call.dc}) {
        if (gradient->data == nullptr) *gradient = {zeros.data(), 0};
    }
    const GatesKernels& kernels = generic::gates_kernels;
    const bool sums = call.dweight != nullptr || call.dz_bias != nullptr;
    Memory packed, scratch, partials;
    void* const pack = aligned(packed, kernels.packed_bytes(call));
    void* const partial = sums ? aligned(partials, kernels.partial_bytes(call)) : nullptr;
    kernels.pack(call, pack);
    kernels.backward(call, pack, aligned(scratch, kernels.scratch_bytes(call)), partial, 0, call.rows);
    if (sums) kernels.reduce(call, partial, 1, 0, kernels.feature_blocks(call));
    return 0;
}
