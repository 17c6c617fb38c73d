// Products with int8 weights, in integers.
//
// A row is rounded to int16 with a factor of its own, and the products are added up in int32, whose sums are exact: a
// row's result does not depend on the rows beside it. The largest number of a row becomes the largest integer of which
// `inputs` products with a weight of 127 fit int32: 32767 up to 516 inputs, 4128 with 4,096. Pairs of inputs lie side
// by side, because one instruction multiplies int16 and adds neighbours: with avx2 twice the products of a float fma.
// VNNI's also adds the sum so far.
#pragma once

#include <cfloat>

#include "cpu_strip.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

using Sums = xsimd::batch<int32_t, xsimd::default_arch>;
using Pairs = xsimd::batch<int16_t, xsimd::default_arch>;
static_assert(Sums::size == width<float> && Pairs::size == 2 * Sums::size);

inline float largest_integer(int64_t inputs) {
    const int64_t fits = (int64_t(1) << 31) / (127 * inputs) - 1;
    return float(fits > 32767 ? 32767 : fits < 1 ? 1 : fits);
}

// What stands at the place of a rounded row: the integers, behind them what one of them is.
inline float& unit_of(char* rounded, int64_t inputs) {
    return *reinterpret_cast<float*>(rounded + rounded_row_bytes(inputs) - 64);
}

// A row with a NaN or an infinite number has a unit of NaN or infinity and integers of zero, so that all its results
// are NaN. Numbers below 1e-30 are zero.
inline void round_row(const float* x, int64_t inputs, char* rounded) {
    int16_t* to = reinterpret_cast<int16_t*>(rounded);
    V most(0.0f);
    bool is_number = true;
    for_blocks<W>(inputs, [&](auto part, int64_t block) __attribute__((always_inline)) {
        const V size = xsimd::abs(part.load(x + block * W));
        is_number = is_number && xsimd::all(size == size);
        most = xsimd::max(most, size);
    });
    const float largest = is_number ? xsimd::reduce_max(most) : __builtin_nanf(""), integer = largest_integer(inputs);
    unit_of(rounded, inputs) = largest / integer;
    const bool is_zero = !(largest > 1e-30f) || largest > FLT_MAX;
    const V factor(is_zero ? 0.0f : integer / largest);
    for_blocks<W>(inputs, [&](auto part, int64_t block) __attribute__((always_inline)) {
        alignas(64) int32_t lanes[W];
        const V scaled = is_zero ? V(0.0f) : part.load(x + block * W) * factor;
        xsimd::nearbyint_as_int(scaled).store_aligned(lanes);
        const int64_t count = inputs - block * W < W ? inputs - block * W : W;
        for (int64_t i = 0; i < count; ++i) to[block * W + i] = int16_t(lanes[i]);
    });
}

// W outputs' weights of a pair of inputs, side by side.
inline __attribute__((always_inline)) Pairs read_pairs(const int8_t* weights) {
#if defined(__AVX512F__)
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)));
#elif defined(__AVX2__)
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
#else
    alignas(64) int16_t lanes[Pairs::size];
    for (int64_t i = 0; i < int64_t(Pairs::size); ++i) lanes[i] = weights[i];
    return Pairs::load_aligned(lanes);
#endif
}

// `sum` plus both products of each pair of weights with a pair of inputs.
inline __attribute__((always_inline)) Sums add_pairs(Sums sum, Pairs weights, int32_t inputs) {
#if defined(__AVX512VNNI__)
    // gcc 12 copies each sum twice around _mm512_dpwssd_epi32, and runs out of registers
    __m512i total = sum;
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(__m512i(weights)), "v"(_mm512_set1_epi32(inputs)));
    return total;
#elif defined(__AVX512F__)
    return sum + Sums(_mm512_madd_epi16(weights, _mm512_set1_epi32(inputs)));
#elif defined(__AVX2__)
    return sum + Sums(_mm256_madd_epi16(weights, _mm256_set1_epi32(inputs)));
#else
    alignas(64) int16_t lanes[Pairs::size];
    alignas(64) int32_t found[Sums::size];
    int16_t x[2];
    std::memcpy(x, &inputs, sizeof x);
    weights.store_aligned(lanes);
    for (int64_t i = 0; i < int64_t(Sums::size); ++i)
        found[i] = int32_t(lanes[2 * i]) * x[0] + int32_t(lanes[2 * i + 1]) * x[1];
    return sum + Sums::load_aligned(found);
#endif
}

template <int strip_vectors, int rows>
inline __attribute__((always_inline)) void int8_strip_rows(const ProductCall& call, int64_t first, int64_t row,
                                                           bool fetches_next) {
    const Panels& panels = call.panels;
    const int64_t pairs = (panels.inputs + 1) / 2, bytes = rounded_row_bytes(panels.inputs);
    const int8_t* w = static_cast<const int8_t*>(panels.weights) + first / panel_outputs * pairs * 2 * panel_outputs +
                      first % panel_outputs * 2;
    const int16_t* x[rows];
    for (int r = 0; r < rows; ++r) x[r] = reinterpret_cast<const int16_t*>(call.rounded + (row + r) * bytes);
    // A panel's last strip lies in L1, where an earlier one has brought it: meanwhile the next panel is fetched.
    const bool is_last =
        strip_vectors * W < panel_outputs && first % panel_outputs + strip_vectors * W == panel_outputs;
    const bool fetches = fetches_next && is_last;
    Sums sum[rows][strip_vectors];
    unrolled<rows>([&](auto r) __attribute__((always_inline)) {
        unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) { sum[r][v] = Sums(0); });
    });
    for (int64_t k = 0; k < pairs; ++k, w += 2 * panel_outputs) {
        if (fetches) __builtin_prefetch(w + pairs * 2 * panel_outputs, 0, 3);
        Pairs weights[strip_vectors];
        unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) { weights[v] = read_pairs(w + v * 2 * W); });
        unrolled<rows>([&](auto r) __attribute__((always_inline)) {
            int32_t inputs;
            std::memcpy(&inputs, x[r] + 2 * k, sizeof inputs);
            unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) {
                sum[r][v] = add_pairs(sum[r][v], weights[v], inputs);
                settle(sum[r][v]);
            });
        });
    }
    unrolled<rows>([&](auto r) __attribute__((always_inline)) {
        V out[strip_vectors];
        const V unit(unit_of(call.rounded + (row + r) * bytes, panels.inputs));
        unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) {
            const V scale = V::load_unaligned(panels.scale + first + v * W) * unit;
            out[v] = xsimd::fma(xsimd::to_float(sum[r][v]), scale, V::load_unaligned(panels.bias + first + v * W));
        });
        write_strip<strip_vectors>(call, out, first, row + r);
    });
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
