// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "gates.h"

namespace depthlstm {
namespace {

const GatesKernels* choose() {
    const char* wanted = std::getenv("DEPTHLSTM_CPU_ISA");
    if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
#if defined(__x86_64__) && !defined(DEPTHLSTM_SANITIZED)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    if (has_avx512_bf16 && (wanted == nullptr || std::strcmp(wanted, "avx512_bf16") == 0)) return &avx512_bf16::gates_kernels;
    if (has_avx512 && (wanted == nullptr || std::strcmp(wanted, "avx512") == 0)) return &avx512::gates_kernels;
    if (has_avx2 && (wanted == nullptr || std::strcmp(wanted, "avx2") == 0)) return &avx2::gates_kernels;
#endif
    if (wanted == nullptr || std::strcmp(wanted, "generic") == 0) return &generic::gates_kernels;
    return nullptr;
}

}  // namespace

const GatesKernels* select_gates_kernels() {
    static const GatesKernels* const chosen = choose();
    return chosen;
}

}  // namespace depthlstm
