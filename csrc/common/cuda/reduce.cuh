// Sums over a row that lies in one warp or in all warps of a block. Every thread gets the sums, always added in the
// same order.
#pragma once

namespace depthlstm {

// The sum over the warp of v[lane / (32 / N)]. Half of the values go to the other half of the lanes, and so on. This
// takes 9 shuffles for 8 values, where one butterfly a value takes 40.
template <int N>
__device__ __forceinline__ float scattered_warp_sum(float (&v)[N], int lane) {
    int offset = 16;
#pragma unroll
    for (int half = N / 2; half >= 1; half /= 2, offset /= 2) {
        const bool upper = (lane & offset) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? v[i + half] : v[i];
            const float given = upper ? v[i] : v[i + half];
            v[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
        }
    }
#pragma unroll
    for (; offset >= 1; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
    return v[0];
}

// One lane applies `finish` to each sum before all lanes get it.
template <int N, class Finish>
__device__ __forceinline__ void warp_sums(float (&v)[N], const Finish& finish) {
    const float sum = finish(scattered_warp_sum(v, threadIdx.x & 31));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __shfl_sync(0xffffffffu, sum, i * (32 / N));
}

// `slots` has N floats a warp. A barrier other than the one in here must come before it is written again.
template <int N, class Finish>
__device__ __forceinline__ void block_sums(float (&v)[N], float* slots, const Finish& finish) {
    if (blockDim.x == 32) {
        warp_sums(v, finish);
        return;
    }
    const int lane = threadIdx.x & 31;
    const float sum = scattered_warp_sum(v, lane);
    if (lane % (32 / N) == 0) slots[threadIdx.x / 32 * N + lane / (32 / N)] = sum;
    __syncthreads();
    // Every warp adds the sums of all warps. A lane adds those of value lane % N of every (32 / N)-th warp, and then
    // the lanes add theirs together.
    float total = 0.f;
    for (int i = lane; i < int(blockDim.x / 32) * N; i += 32) total += slots[i];
#pragma unroll
    for (int offset = N; offset < 32; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    total = finish(total);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = __shfl_sync(0xffffffffu, total, i);
}

// A row in one warp.
struct WarpRow {
    template <int N, class Finish>
    __device__ __forceinline__ void sum(float (&v)[N], int, const Finish& finish) const {
        warp_sums(v, finish);
    }
};

// A row in a block of at most `warps` warps. Sums are numbered, and each number has its own slots. A sum of another
// number must come between two sums of one number. With two numbers in turn one barrier a sum is enough.
template <int warps, int numbers>
struct BlockRow {
    float (*slots)[warps * 8];  // shared memory
    template <int N, class Finish>
    __device__ __forceinline__ void sum(float (&v)[N], int number, const Finish& finish) const {
        block_sums(v, slots[number], finish);
    }
};

}  // namespace depthlstm
