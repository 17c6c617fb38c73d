// The CUDA gates kernels as C functions: raw pointers, sizes and a stream; no torch header, no CUDA header.
#pragma once

#include "call.h"

namespace depthlstm {

// A GatesCall with pointers into the GPU's memory, and the additional arguments of a GPU.
struct CudaCall {
    GatesCall gates;  // `seed` and `stream` are not read; dh.data and dc.data may be null for zeros
    // The Philox key in the GPU's memory, or null for no dropout. A captured graph reads the key of its replay.
    const uint64_t* seed = nullptr;
    ConstRows z_more;  // (rows, K D) added to z in fp32, of z's dtype, or null; forward only: a second partial product
    void* workspace = nullptr;  // depthlstm_cuda_workspace_bytes() of the GPU's memory, 256-byte aligned; backward only
    int32_t device = 0;         // made the current one for the call; the former one is restored
    void* stream = nullptr;     // cudaStream_t
};

}  // namespace depthlstm

extern "C" {
// Each returns a cudaError_t, 0 for success. Only the arguments that choose the kernel are checked. A call without rows
// launches nothing.
int depthlstm_cuda_gates_forward(const depthlstm::CudaCall* call);
int depthlstm_cuda_gates_backward(const depthlstm::CudaCall* call);
// Bytes of working memory of a backward pass, for a call that lacks only this memory; negative: minus a cudaError_t.
int64_t depthlstm_cuda_workspace_bytes(const depthlstm::CudaCall* call);
// CUDA's message for an error.
const char* depthlstm_cuda_error(int error);
}
