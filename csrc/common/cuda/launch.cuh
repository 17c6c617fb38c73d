// Kernel launches: the device, the check for whole 16-byte vectors, the number of blocks that the GPU holds at a time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "common/types.h"

namespace depthlstm {

constexpr int max_devices = 64;

struct GpuDevice {
    int index, multiprocessors;
    cudaStream_t stream;
};

// Makes a device the current one during its lifetime.
class CurrentDevice {
public:
    explicit CurrentDevice(int device) {
        error_ = cudaGetDevice(&before_);
        changed_ = error_ == cudaSuccess && before_ != device;
        if (changed_) error_ = cudaSetDevice(device);
    }
    ~CurrentDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;
    cudaError_t error() const { return error_; }

private:
    int before_ = 0;
    bool changed_ = false;
    cudaError_t error_;
};

// The device's figures; CUDA is asked once.
inline cudaError_t describe(int index, void* stream, GpuDevice* device) {
    static std::atomic<int> known[max_devices];
    std::atomic<int>& place = known[index % max_devices];
    int multiprocessors = place.load(std::memory_order_relaxed);
    if (multiprocessors == 0) {
        const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
        if (error != cudaSuccess) return error;
        place.store(multiprocessors, std::memory_order_relaxed);
    }
    *device = {index, multiprocessors, static_cast<cudaStream_t>(stream)};
    return cudaSuccess;
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Whether vectors of `width` features can be read and written 16 bytes at a time. A null pointer is aligned.
template <class T>
bool is_aligned(std::initializer_list<ConstRows> operands, int64_t features, int64_t width) {
    bool aligned = features % width == 0;
    for (const ConstRows& rows : operands) {
        aligned =
            aligned && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * int64_t(sizeof(T)) % 16 == 0;
    }
    return aligned;
}

// Number of blocks of a kernel that the GPU holds at a time. The query takes a microsecond or two, so answers are kept.
template <auto kernel>
cudaError_t resident_blocks(const GpuDevice& device, int threads, int* blocks) {
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

// Launches one block for `rows_at_once` rows, but no more blocks than the GPU holds at a time. The blocks loop over the
// remaining rows.
template <auto kernel, class Launch>
cudaError_t launch_rows(const Launch& launch, int64_t rows, const GpuDevice& device, int threads,
                        int64_t rows_at_once) {
    int resident = 0;
    const cudaError_t error = resident_blocks<kernel>(device, threads, &resident);
    if (error != cudaSuccess) return error;
    const int64_t blocks = std::min<int64_t>((rows + rows_at_once - 1) / rows_at_once, resident);
    kernel<<<unsigned(blocks), threads, 0, device.stream>>>(launch);
    return cudaGetLastError();
}

}  // namespace depthlstm
