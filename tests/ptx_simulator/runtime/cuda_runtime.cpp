// A stand-in for libcudart. Host code compiled by nvcc, `<<<>>>` included, launches into the simulator through it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "launch.h"

namespace {

using cudaError_t = int;
using cudaStream_t = void*;
using Size = ptx::Dimensions;  // CUDA's dim3

constexpr size_t default_shared_memory = 48 << 10;  // the limit of a block without a request
constexpr int occupancy = 2, devices = 2;
constexpr int multiprocessors[devices] = {2, 132};  // few, so that a block takes several rows; and as many as a GPU has
int current_device = 0, device_of_last_launch = 0;

struct Function {
    std::string name;
    size_t dynamic_shared = 0;  // requested by cudaFuncSetAttribute
};
std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> known;
    return known;
}

struct {
    Size grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;  // of the current `<<<>>>`
cudaError_t last = ptx::success;

cudaError_t remember(cudaError_t error) { return error == ptx::success ? error : last = error; }

size_t static_shared(const Function& function) {
    const ptx::Kernel* kernel = ptx::find_kernel(function.name);
    return kernel ? kernel->shared_used : 0;
}

const char* name_of(cudaError_t error) {
    switch (error) {
        case ptx::success: return "cudaSuccess";
        case ptx::invalid_value: return "cudaErrorInvalidValue";
        case ptx::out_of_memory: return "cudaErrorMemoryAllocation";
        case ptx::invalid_configuration: return "cudaErrorInvalidConfiguration";
        case ptx::invalid_device_function: return "cudaErrorInvalidDeviceFunction";
        case ptx::launch_failure: return "cudaErrorLaunchFailure";
        case ptx::not_supported: return "cudaErrorNotSupported";
        default: return "unrecognized error code";
    }
}

}  // namespace

// Called by code that nvcc generates.
extern "C" {
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
    functions()[host_function].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(Size grid, Size block, size_t shared, cudaStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return ptx::success;
}
cudaError_t cudaLaunchKernel(const void* host_function, Size grid, Size block, void** arguments, size_t shared,
                             cudaStream_t) {
    const auto found = functions().find(host_function);
    if (found == functions().end()) return remember(ptx::invalid_device_function);
    const Function& function = found->second;
    device_of_last_launch = current_device;
    const size_t used = static_shared(function) + shared;
    if (used > default_shared_memory && shared > function.dynamic_shared) return remember(ptx::invalid_value);
    return remember(ptx::launch(function.name, {grid, block, shared}, arguments));
}
cudaError_t __cudaGetKernel(void** kernel, const void* host_function) {
    *kernel = const_cast<void*>(host_function);
    return ptx::success;
}
cudaError_t __cudaLaunchKernel(void* kernel, Size grid, Size block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
struct LaunchConfiguration {  // CUDA's cudaLaunchConfig_t
    Size grid, block;
    size_t shared;
    cudaStream_t stream;
    void* attributes;
    unsigned attribute_count;
};
cudaError_t cudaLaunchKernelExC(const LaunchConfiguration* launch, const void* host_function, void** arguments) {
    if (launch->attribute_count > 0) return remember(ptx::not_supported);
    return cudaLaunchKernel(host_function, launch->grid, launch->block, arguments, launch->shared, launch->stream);
}
}

// Called by programs.
extern "C" {
cudaError_t cudaGetLastError() { return std::exchange(last, ptx::success); }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t error) { return name_of(error); }
const char* cudaGetErrorString(cudaError_t error) {
    const bool of_launch =
        error == ptx::launch_failure || error == ptx::invalid_configuration || error == ptx::invalid_device_function;
    return of_launch ? ptx::error_of_last_launch().c_str() : error == ptx::success ? "no error" : name_of(error);
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return ptx::success;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices) return remember(101);
    current_device = device;
    return ptx::success;
}
// The current device, plus 16 times the device of the last launch.
[[gnu::visibility("default")]] int ptx_devices() { return current_device + 16 * device_of_last_launch; }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = devices;
    return ptx::success;
}
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device) {
    if (device < 0 || device >= devices) return remember(101);
    constexpr int multiprocessor_count = 16;
    static const std::map<int, int> values = {
        {1, 1024},                         // threads of a block
        {2, 1024},                         // in x
        {3, 1024},                         // in y
        {4, 64},                           // in z
        {5, 0x7fffffff},                   // blocks of a grid in x
        {6, 65535},                        // in y
        {7, 65535},                        // in z
        {8, int(default_shared_memory)},   // shared memory of a block
        {10, 32},                          // lanes of a warp
        {12, 65536},                       // registers of a block
        {38, 50 << 20},                    // L2 cache
        {39, 2048},                        // threads of a multiprocessor
        {75, 9},                           // compute capability
        {76, 0},                           // its minor number
        {81, 233472},                      // shared memory of a multiprocessor
        {82, 65536},                       // its registers
        {97, ptx::largest_shared_memory},  // shared memory of a block that asks for it
        {106, 32},                         // blocks of a multiprocessor
    };
    if (attribute == multiprocessor_count) {
        *value = multiprocessors[device];
        return ptx::success;
    }
    const auto found = values.find(attribute);
    if (found == values.end()) return remember(ptx::invalid_value);
    *value = found->second;
    return ptx::success;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = occupancy;
    return ptx::success;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
cudaError_t cudaFuncSetAttribute(const void* host_function, int attribute, int value) {
    constexpr int largest_dynamic_shared = 8, shared_carveout = 9;
    const auto found = functions().find(host_function);
    if (found == functions().end()) return remember(ptx::invalid_device_function);
    if (attribute == shared_carveout) return ptx::success;
    if (attribute != largest_dynamic_shared || value < 0) return remember(ptx::invalid_value);
    if (static_shared(found->second) + value > ptx::largest_shared_memory) return remember(ptx::invalid_value);
    found->second.dynamic_shared = value;
    return ptx::success;
}

// The device's memory is ordinary memory. Unwritten elements are NaN.
cudaError_t cudaMalloc(void** memory, size_t size) {
    if (posix_memalign(memory, 256, size)) return remember(ptx::out_of_memory);
    memset(*memory, 0xff, size);
    return ptx::success;
}
cudaError_t cudaFree(void* memory) {
    free(memory);
    return ptx::success;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, int) {
    memcpy(target, source, size);
    return ptx::success;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, int kind, cudaStream_t) {
    return cudaMemcpy(target, source, size, kind);
}
cudaError_t cudaMemset(void* target, int value, size_t size) {
    memset(target, value, size);
    return ptx::success;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t) {
    return cudaMemset(target, value, size);
}
cudaError_t cudaDeviceSynchronize() { return ptx::success; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return ptx::success; }
}
