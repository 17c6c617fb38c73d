// Two small kernels for the tests of the simulator, each without a fault and with planted ones.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

enum Fault {
    none,
    no_syncthreads,
    no_syncwarp,
    divergent_barrier,  // one warp waits in a barrier that is not the others'
    lonely_barrier,     // one warp waits in a barrier that the others never reach
    absent_lane,        // only some of the named lanes take part in a shuffle
    beyond_global,
    beyond_shared,
    misaligned,
    blocks_add_without_atomics,
    fault_count,
};

constexpr int warp_size = 32;
constexpr int block_size = 128;
constexpr int warps = block_size / warp_size;

__device__ float warp_sum(float value) {
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffff, value, distance);
    }
    return value;
}

// The sum of each row, a block a row: warps reduce in registers, then through shared memory. rows_done counts them.
template <Fault fault>
__global__ void __launch_bounds__(block_size)
    sum_rows_kernel(const float* input, float* output, int* rows_done, int columns) {
    __shared__ float partial[warps];
    __shared__ float neighbour[block_size];
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const float* row = input + static_cast<size_t>(blockIdx.x) * columns;
    float sum = 0;
    for (int column = threadIdx.x; column < columns; column += block_size) sum += row[column];

    // a lane adds its neighbour's value to its own, through shared memory, and half of that is summed
    neighbour[threadIdx.x] = sum;
    if (fault != no_syncwarp) __syncwarp();
    sum = 0.5f * (sum + neighbour[warp * warp_size + (lane + 1) % warp_size]);
    if (fault == absent_lane) {
        if (lane < 16) sum += __shfl_down_sync(0xffffffff, sum, 1);
    }
    sum = warp_sum(sum);

    if (lane == 0) partial[fault == beyond_shared ? warp + 1 : warp] = sum;
    if (fault == divergent_barrier || fault == lonely_barrier) {
        if (warp == 0) __syncthreads();
    }
    if (fault != no_syncthreads && fault != lonely_barrier) __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int i = 0; i < warps; i++) total += partial[i];
        output[fault == beyond_global ? blockIdx.x + 1 : blockIdx.x] = total;
        if (fault == blocks_add_without_atomics) {
            *rows_done += 1;
        } else {
            atomicAdd(rows_done, 1);
        }
    }
}

struct Rows {
    const __nv_bfloat16* source;
    __nv_bfloat16* target;
    long long source_stride, target_stride;  // in elements
    int rows, columns;
};

// Copies rows with a stride between them, a warp a row: 16 bytes a lane, and the rest element by element.
template <Fault fault>
__global__ void __launch_bounds__(256) copy_rows_kernel(const __grid_constant__ Rows call) {
    constexpr int vector = 8;
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= call.rows) return;
    const __nv_bfloat16* source = call.source + row * call.source_stride;
    __nv_bfloat16* target = call.target + row * call.target_stride;
    const int whole = call.columns / vector * vector;
    for (int column = threadIdx.x * vector; column < whole; column += warp_size * vector) {
        const uint4 values =
            __ldg(reinterpret_cast<const uint4*>(source + column - (fault == misaligned && column > 0 ? 1 : 0)));
        __stcs(reinterpret_cast<uint4*>(target + column), values);
    }
    for (int column = whole + threadIdx.x; column < call.columns; column += warp_size) target[column] = source[column];
}

using SumRows = void (*)(const float*, float*, int*, int);
constexpr SumRows sum_kernels[fault_count] = {
    sum_rows_kernel<none>,
    sum_rows_kernel<no_syncthreads>,
    sum_rows_kernel<no_syncwarp>,
    sum_rows_kernel<divergent_barrier>,
    sum_rows_kernel<lonely_barrier>,
    sum_rows_kernel<absent_lane>,
    sum_rows_kernel<beyond_global>,
    sum_rows_kernel<beyond_shared>,
    nullptr,
    sum_rows_kernel<blocks_add_without_atomics>,
};

}  // namespace

extern "C" {
int sum_rows(int fault, const float* input, float* output, int* rows_done, int rows, int columns, cudaStream_t stream) {
    sum_kernels[fault]<<<rows, block_size, 0, stream>>>(input, output, rows_done, columns);
    return cudaGetLastError();
}
int copy_rows(int fault, const void* source, void* target, long long source_stride, long long target_stride, int rows,
              int columns, cudaStream_t stream) {
    const dim3 block(warp_size, 8);
    const Rows call = {static_cast<const __nv_bfloat16*>(source),
                       static_cast<__nv_bfloat16*>(target),
                       source_stride,
                       target_stride,
                       rows,
                       columns};
    const auto kernel = fault == misaligned ? copy_rows_kernel<misaligned> : copy_rows_kernel<none>;
    kernel<<<(rows + block.y - 1) / block.y, block, 0, stream>>>(call);
    return cudaGetLastError();
}
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
