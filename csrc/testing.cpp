// For the tests alone: the scalar formulas of gate_math.h, the vector ones of this CPU's kernels through gates.h, and a dirty stack.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <alloca.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gates.h"
#include "gate_math.h"

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
    add("gelu", Gelu());
    add("gelu_tanh", GeluTanh());
    add("relu", Relu());
    add("tanh", Tanh());
    add("silu", Silu());
    add("sigmoid_activation", Sigmoid());
    return found;
}

// The formulas for 16-bit results, whose polynomials differ
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
    if (isa == "generic") return generic::gates_kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::gates_kernels;
    if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return avx512::gates_kernels;
#endif
    throw std::invalid_argument("this CPU or build has no " + isa);
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// One row through one instruction set's forward kernel with norm none: (h, c), z (4, D) and c (D) in fp32 or fp64.
template <class T>
py::tuple forward(const std::string& isa, py::array_t<T, py::array::c_style> z, py::array_t<T, py::array::c_style> c, int activation) {
    const GatesKernels& kernels = kernels_of(isa);
    GatesCall call;
    call.rows = 1;
    call.features = c.size();
    if (z.size() != 4 * call.features) throw std::invalid_argument("z must have 4 D elements");
    call.z_dtype = call.c_dtype = call.affine_dtype = call.z_bias_dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
    call.norm = Norm::none;
    call.activation = Activation(activation);
    py::array_t<T> h(call.features), c_out(call.features);
    call.z = {z.data(), 4 * call.features};
    call.c = {c.data(), call.features};
    call.h = {h.mutable_data(), call.features};
    call.c_out = {c_out.mutable_data(), call.features};
    const auto memory = [](int64_t bytes) {
        return std::unique_ptr<void, Free>(std::aligned_alloc(64, std::size_t((bytes + 127) / 64 * 64)));
    };
    const auto packed = memory(kernels.packed_bytes(call)), scratch = memory(kernels.scratch_bytes(call));
    kernels.pack(call, packed.get());
    kernels.forward(call, packed.get(), scratch.get(), 0, 1);
    return py::make_tuple(h, c_out);
}

// Leaves `bytes` of the stack below the caller filled with `fill` (0xff is NaN in every type): what a later call finds there.
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
    m.def("forward_float", &forward<float>);
    m.def("forward_double", &forward<double>);
    m.def("dirty_stack", &dirty_stack);
}
