#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace depthlstm {

bool has_isa(Isa isa) {
#if defined(__x86_64__) && !defined(DEPTHLSTM_SANITIZED)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx512_bf16)
        return has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (isa == Isa::avx512) return has_avx512;
    if (isa == Isa::avx2) return has_avx2;
#endif
    return isa == Isa::generic;
}

const char* isa_name(Isa isa) {
#define DEPTHLSTM_WORD(name) #name,
    static constexpr const char* names[] = {DEPTHLSTM_ISAS(DEPTHLSTM_WORD) ""};
#undef DEPTHLSTM_WORD
    return names[int(isa)];
}

Isa chosen_isa() {
    static const Isa chosen = [] {
        const char* wanted = std::getenv("DEPTHLSTM_CPU_ISA");
        for (int i = int(Isa::none) - 1; i >= 0; --i) {
            const bool named = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, isa_name(Isa(i))) == 0;
            if (named && has_isa(Isa(i))) return Isa(i);
        }
        return Isa::none;
    }();
    return chosen;
}

}  // namespace depthlstm
