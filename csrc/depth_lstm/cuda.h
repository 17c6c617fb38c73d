// The gates kernels of CUDA as C functions: raw pointers, sizes and a stream; no torch header, no CUDA header.
#pragma once

#include "call.h"

namespace depthlstm {

// A GatesCall whose pointers are the GPU's, and what a GPU needs beside it.
struct CudaCall {
    GatesCall gates;  // `seed` and `stream` are not read; dh.data and dc.data may be null for zeros
    const uint64_t* seed =
        // the Philox key in the GPU's memory, or null for no dropout: a captured graph reads the key of its replay
        nullptr;
    ConstRows z_more;  // (rows, K D) added to z in fp32, of z's dtype, or null; forward only: a second partial product
    void* workspace = nullptr;  // depthlstm_cuda_workspace_bytes() of the GPU's memory, 256-byte aligned; backward only
    int32_t device = 0;         // made the current one for the call, and then put back
    void* stream = nullptr;     // cudaStream_t
};

}  // namespace depthlstm

extern "C" {
// Each returns a cudaError_t, 0 for success; no argument is checked beyond what chooses the kernel. No rows is no
// launch.
int depthlstm_cuda_gates_forward(const depthlstm::CudaCall* call);
int depthlstm_cuda_gates_backward(const depthlstm::CudaCall* call);
// Bytes of working memory of a backward pass, for a call that is complete but for it; negative: minus a cudaError_t.
int64_t depthlstm_cuda_workspace_bytes(const depthlstm::CudaCall* call);
// What CUDA says of an error.
const char* depthlstm_cuda_error(int error);
}
