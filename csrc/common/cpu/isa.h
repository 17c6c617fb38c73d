// The instruction sets that kernels are compiled for, and the choice of one.
#pragma once

namespace depthlstm {

// Instruction sets from the narrowest to the widest. The kernels of a set lie in a namespace of its name.
#if defined(__x86_64__) && !defined(DEPTHLSTM_SANITIZED)
#define DEPTHLSTM_ISAS(X) X(generic) X(avx2) X(avx512) X(avx512_bf16)
#else
#define DEPTHLSTM_ISAS(X) X(generic)
#endif

#define DEPTHLSTM_ENUMERATOR(isa) isa,
enum class Isa : int { DEPTHLSTM_ISAS(DEPTHLSTM_ENUMERATOR) none };
#undef DEPTHLSTM_ENUMERATOR

// Whether this CPU can run the set.
bool has_isa(Isa isa);

// The widest set this CPU has, or the set that DEPTHLSTM_CPU_ISA names. It is none where that set cannot run here. The
// first call decides.
Isa chosen_isa();

// The set's name; empty for none.
const char* isa_name(Isa isa);

// The chosen table of an op's tables of kernels, which stand in the order of the list. It is null where no set can run.
// Static, because the linker must not take the copy of a file that is compiled for a wider set.
template <class Kernels, int count>
static const Kernels* chosen_kernels(const Kernels* const (&tables)[count]) {
    static_assert(count == int(Isa::none), "a table for each instruction set");
    return chosen_isa() == Isa::none ? nullptr : tables[int(chosen_isa())];
}

}  // namespace depthlstm
