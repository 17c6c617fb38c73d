// Interface between the stand-in for the CUDA runtime and the simulator's launch function.
#pragma once
#include <cstddef>
#include <string>

#include "scheduler.h"

namespace ptx {

enum CudaError {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    invalid_configuration = 9,
    invalid_device_function = 98,
    launch_failure = 719,
    not_supported = 801,
};
constexpr size_t largest_shared_memory = 232448;  // of a block that requests it, on sm_90

const Kernel* find_kernel(const std::string& name);  // nullptr if there is none, or more than one
int launch(const std::string& name, LaunchSize size, void** arguments);
const std::string& error_of_last_launch();

}  // namespace ptx
