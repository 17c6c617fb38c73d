// The CPU kernels without Python and torch: small sizes, every type and option, against plain loops in double.
//
// Every buffer has exactly the size that the interface promises, and lies against a page that may not be touched. The
// program also runs under an emulated old CPU, where Python and torch would take minutes. The exit status is 1 on any
// wrong value. smoke_<op>.cpp has an op's cases. With the argument `reuse`, for emulated machines,
// buffers serve again, as guarded.h explains, and the team of threads is left out: there it waits for timers.
#include "smoke.h"

#include "depth_lstm/cpu.h"

int smoke_decode();  // smoke_decode.cpp
int smoke_team();    // smoke_team.cpp

int main(int count, char** arguments) {
    using namespace depthlstm;
    memory_serves_again = count > 1 && std::strcmp(arguments[1], "reuse") == 0;
    const GatesKernels* kernels = select_gates_kernels();
    if (kernels == nullptr) {
        std::printf("smoke: DEPTHLSTM_CPU_ISA names an instruction set that this CPU lacks\n");
        return 1;
    }
    smoke::smoke_depth_lstm();
    smoke::smoke_norm_step();
    smoke::smoke_siamese_step();
    smoke::smoke_depth_gru_gates();
    smoke::smoke_layer_mix();
    smoke::smoke_layer_attend();
    std::printf("smoke: %s, %d outputs compared, %d wrong\n", kernels->isa, smoke::checks, smoke::failures);
    int failures = smoke::failures + smoke_decode();
    if (!memory_serves_again) failures += smoke_team();
    return failures == 0 ? 0 : 1;
}
