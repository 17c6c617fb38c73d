// How kernels are launched: which rows are whole 16-byte vectors, how many blocks the GPU holds at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>

#include "gates.cuh"
#include "kernels.h"

namespace depthlstm {

// Up to this many rows for each multiprocessor a row gets a block of its own: a guess, not measured.
constexpr int64_t few_rows = 4;
constexpr int max_devices = 64;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Whether vectors of `width` features can be read and written 16 bytes at a time. A null pointer is aligned.
template <class T>
bool is_aligned(std::initializer_list<ConstRows> operands, int64_t features, int64_t width) {
    bool aligned = features % width == 0;
    for (const ConstRows& rows : operands) {
        aligned = aligned && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * int64_t(sizeof(T)) % 16 == 0;
    }
    return aligned;
}

inline bool is_aligned_affine(const GatesCall& call) {
    return (reinterpret_cast<uintptr_t>(call.weight) | reinterpret_cast<uintptr_t>(call.bias) | reinterpret_cast<uintptr_t>(call.z_bias)) %
               16 ==
           0;
}

// Blocks of a kernel that the GPU holds at a time. The question takes a microsecond or two, so the answers are kept.
template <auto kernel>
cudaError_t resident_blocks(const Device& device, int threads, int* blocks) {
    static std::atomic<int> known[max_devices][32];
    std::atomic<int>& place = known[device.index % max_devices][(threads - 1) / 32];
    *blocks = place.load(std::memory_order_relaxed);
    if (*blocks > 0) return cudaSuccess;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, 0);
    if (error != cudaSuccess) return error;
    *blocks = std::max(1, *blocks) * device.multiprocessors;
    place.store(*blocks, std::memory_order_relaxed);
    return cudaSuccess;
}

// One block for `rows_at_once` rows, as many blocks as the GPU holds at a time; they go on with the rows that are left.
template <auto kernel>
cudaError_t launch_rows(const Launch& launch, const Device& device, int threads, int64_t rows_at_once) {
    int resident = 0;
    const cudaError_t error = resident_blocks<kernel>(device, threads, &resident);
    if (error != cudaSuccess) return error;
    const int64_t blocks = std::min<int64_t>((launch.call.rows + rows_at_once - 1) / rows_at_once, resident);
    kernel<<<unsigned(blocks), threads, 0, device.stream>>>(launch);
    return cudaGetLastError();
}

}  // namespace depthlstm
