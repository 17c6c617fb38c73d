// Bindings for the tests only: the scalar formulas, the kernels of each instruction set through depth_lstm/cpu.h, a
// dirty stack.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <alloca.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "depth_lstm/cpu.h"
#include "depth_lstm/math.h"

namespace py = pybind11;

namespace {

using namespace depthlstm;

template <class T>
py::dict formulas(T a) {
    py::dict found;
    const Normal<T> n = normal<false>(a);
    found["sigmoid"] = sigmoid<false>(a);
    found["cdf"] = n.cdf;
    found["pdf"] = n.pdf;
    found["normal_cdf"] = normal_cdf<false>(a);
    const auto add = [&]<class Act>(const char* name, Act) {
        T value, slope;
        Act::template value_and_slope<false>(a, value, slope);
        found[name] = py::make_tuple(Act::template value<false>(a), value, slope);
    };
#define DEPTHLSTM_ADD(name, functions) add("act " #name, functions());
    DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_ADD)
#undef DEPTHLSTM_ADD
    return found;
}

// The formulas for 16-bit results, whose polynomials differ.
py::dict fast_formulas(float a) {
    py::dict found;
    const Normal<float> n = normal<true>(a);
    found["cdf"] = n.cdf;
    found["pdf"] = n.pdf;
    found["normal_cdf"] = normal_cdf<true>(a);
    return found;
}

std::array<uint32_t, 4> philox_words(uint64_t seed, uint64_t row, uint32_t block) {
    std::array<uint32_t, 4> words;
    philox(seed, row, block, words.data());
    return words;
}

std::array<double, 5> cell_gradient(double i, double f, double o, double g, double c_in, double dh, double dc) {
    const CellGradient<double> d = cell_backward(i, f, o, g, c_in, dh, dc);
    return {d.da_i, d.da_f, d.da_o, d.dg, d.dc_in};
}

std::array<double, 2> cell(double i, double f, double o, double g, double c_in) {
    std::array<double, 2> out;
    cell_forward(i, f, o, g, c_in, out[0], out[1]);
    return out;
}

const GatesKernels& kernels_of(const std::string& isa) {
#define DEPTHLSTM_FIND(name) \
    if (isa == #name && has_isa(Isa::name)) return name::gates_kernels;
    DEPTHLSTM_ISAS(DEPTHLSTM_FIND)
#undef DEPTHLSTM_FIND
    throw std::invalid_argument("this CPU or build has no " + isa);
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> memory(int64_t bytes) {
    return std::unique_ptr<void, Free>(std::aligned_alloc(64, std::size_t((bytes + 127) / 64 * 64)));
}

// Runs the GatesCall at `address` with one instruction set's kernels, in chunks of `chunk_rows`: forward if h is set,
// else backward.
void run(const std::string& isa, uintptr_t address, int64_t chunk_rows) {
    const GatesKernels& kernels = kernels_of(isa);
    const GatesCall& call = *reinterpret_cast<const GatesCall*>(address);
    const int64_t chunks = (call.rows + chunk_rows - 1) / chunk_rows, partial_bytes = kernels.partial_bytes(call);
    const auto packed = memory(kernels.packed_bytes(call)), scratch = memory(kernels.scratch_bytes(call));
    const auto partials = memory(chunks * partial_bytes);
    kernels.pack(call, packed.get());
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * chunk_rows, end = std::min(call.rows, begin + chunk_rows);
        if (call.h.data != nullptr) {
            kernels.forward(call, packed.get(), scratch.get(), begin, end);
        } else {
            kernels.backward(call, packed.get(), scratch.get(),
                             static_cast<char*>(partials.get()) + chunk * partial_bytes, begin, end);
        }
    }
    if (call.h.data == nullptr) kernels.reduce(call, partials.get(), chunks, 0, kernels.feature_blocks(call));
}

// Fills `bytes` of the stack below the caller with `fill` (0xff is NaN in every type), for a later call to find.
__attribute__((noinline)) void dirty_stack(std::size_t bytes, int fill) {
    char* room = static_cast<char*>(alloca(bytes));
    std::memset(room, fill, bytes);
    asm volatile("" : : "r"(room) : "memory");
}

}  // namespace

PYBIND11_MODULE(_internals, m) {
    m.def("formulas_float", &formulas<float>);
    m.def("formulas_double", &formulas<double>);
    m.def("fast_formulas", &fast_formulas);
    m.def("philox", &philox_words);
    m.def("cell_forward", &cell);
    m.def("cell_backward", &cell_gradient);
    m.def("run", &run);
    m.def("dirty_stack", &dirty_stack);
}
