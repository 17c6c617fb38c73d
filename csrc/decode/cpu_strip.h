// Strips: the part of a panel that one group of rows is multiplied with.
#pragma once

#include <utility>

#include "common/cpu/rows.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

using V = Vector<float>;
constexpr int64_t W = width<float>;
// Vectors of a strip and the most rows beside it. AVX-512 has 32 registers, others 16.
constexpr int wide_vectors = W == 16 ? 2 : 4, narrow_vectors = 2;
constexpr int rows_of_wide = W == 16 ? 8 : 3, rows_of_narrow = W == 16 ? 8 : 6;

// f(0), ..., f(count - 1). What f indexes by its argument may lie in registers: GCC unrolls a loop too late for that,
// and kept a product's sums in memory, at half the speed.
template <int count, class Function>
inline __attribute__((always_inline)) void unrolled(Function f) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, i>()), ...);
    }(std::make_integer_sequence<int, count>());
}

// Has a sum in a register here: GCC 12 would make many products first and add them later, out of registers.
template <class Batch>
inline __attribute__((always_inline)) void settle(Batch& sum) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(sum.data));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(sum.data));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(sum.data));
#endif
}

// Writes a strip of a row of which only `count` outputs exist.
__attribute__((noinline)) void write_part(const V* sums, const float* base, float* y, int64_t count) {
    alignas(64) float whole[wide_vectors * W];
    for (int v = 0; v * W < count; ++v) sums[v].store_aligned(whole + v * W);
    for (int64_t i = 0; i < count; ++i) y[i] = base == nullptr ? whole[i] : base[i] + whole[i];
}

template <int strip_vectors>
inline __attribute__((always_inline)) void write_strip(const ProductCall& call, V* out, int64_t first, int64_t row) {
    float* y = call.y + row * call.y_stride + first;
    const float* base = call.base == nullptr ? nullptr : call.base + row * call.base_stride + first;
    const int64_t count = call.panels.outputs - first;
    if (count < strip_vectors * W) return write_part(out, base, y, count);
    for (int v = 0; v < strip_vectors; ++v) {
        if (base != nullptr) out[v] += V::load_unaligned(base + v * W);
        out[v].store_unaligned(y + v * W);
    }
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
