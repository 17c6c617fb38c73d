// Interface between cuda_launch.cu and the kernels, which are compiled once for each dtype of z.
#pragma once

#include "common/cuda/launch.cuh"

namespace depthlstm {

struct Launch;

#define DEPTHLSTM_JOIN_(a, b) a##_##b
#define DEPTHLSTM_JOIN(a, b) DEPTHLSTM_JOIN_(a, b)
#define DEPTHLSTM_Z_FUNCTION(name) DEPTHLSTM_JOIN(name, DEPTHLSTM_Z)

// The kernels of one dtype lie in a namespace of its name, so that tools tell them apart.
#define DEPTHLSTM_Z_NAMESPACE DEPTHLSTM_JOIN(z, DEPTHLSTM_Z)

#define DEPTHLSTM_DECLARE(z)                                                \
    cudaError_t forward_##z(const Launch& launch, const GpuDevice& device); \
    cudaError_t backward_##z(Launch& launch, const GpuDevice& device, void* workspace, int64_t* workspace_bytes)
DEPTHLSTM_DECLARE(float);
DEPTHLSTM_DECLARE(bfloat16);
DEPTHLSTM_DECLARE(float16);
#undef DEPTHLSTM_DECLARE

// Sums `partial` over the programs, in their order, into dweight, dbias and dz_bias.
cudaError_t sum_partials(const Launch& launch, int64_t programs, cudaStream_t stream);

}  // namespace depthlstm
