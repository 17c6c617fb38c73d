// Products of few or many rows with a packed matrix.
//
// A strip is a part of a panel whose accumulators fit the registers with several rows'. bfloat16 and int8 take narrow
// strips for several rows, because a weight that was widened then serves more of them. One row of floats has several
// accumulators for each output, because one chain of additions would wait for its own latency.
#pragma once

#include "cpu_product_int8.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int least_accumulators = 8;

// Vector v of the weights of input i, where `inputs` of them lie side by side.
template <WeightType type>
struct Weights;

template <>
struct Weights<WeightType::float32> {
    static constexpr int inputs = 1;
    static constexpr int64_t element_bytes = 4;
    static inline __attribute__((always_inline)) V read(const char* at, int v, int) {
        return V::load_unaligned(reinterpret_cast<const float*>(at) + v * W);
    }
};

template <>
struct Weights<WeightType::bfloat16> {
    static constexpr int inputs = 2;
    static constexpr int64_t element_bytes = 2;
    using I = xsimd::batch<uint32_t, xsimd::default_arch>;
    static inline __attribute__((always_inline)) V read(const char* at, int v, int i) {
        const I pair = I::load_unaligned(reinterpret_cast<const uint32_t*>(at) + v * W);
        return xsimd::bitwise_cast<float>(i == 0 ? pair << 16 : pair & I(0xffff0000u));
    }
};

template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void strip_rows(const ProductCall& call, int64_t first, int64_t row,
                                                      bool fetches_next) {
    using Read = Weights<type>;
    constexpr int chains = rows == 1 ? least_accumulators / strip_vectors : 1;
    constexpr int64_t step = Read::inputs;
    constexpr int64_t stride = panel_outputs * step * Read::element_bytes;
    constexpr int64_t strip_bytes = strip_vectors * W * step * Read::element_bytes;
    const Panels& panels = call.panels;
    const int64_t inputs = panels.inputs, steps = inputs / step;
    const int64_t panel_bytes = (inputs + step - 1) / step * stride;
    const char* w = static_cast<const char*>(panels.weights) + first / panel_outputs * panel_bytes +
                    first % panel_outputs * step * Read::element_bytes;
    // of float32 that took 1.1 times as long, and a row's weights are one stream anyway
    const bool fetches = type == WeightType::bfloat16 && rows > 1 && fetches_next;
    const bool is_last = first % panel_outputs + strip_vectors * W == panel_outputs;
    const int64_t to_next = is_last ? panel_bytes - stride + strip_bytes : strip_bytes;
    const float* x[rows];
    for (int r = 0; r < rows; ++r) x[r] = call.x + (row + r) * call.x_stride;
    V sum[chains][rows][strip_vectors];
    const auto for_all = [](auto f) __attribute__((always_inline)) {
        unrolled<chains>([&](auto u) __attribute__((always_inline)) {
            unrolled<rows>([&](auto r) __attribute__((always_inline)) {
                unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) { f(u, r, v); });
            });
        });
    };
    for_all([&](auto u, auto r, auto v) __attribute__((always_inline)) { sum[u][r][v] = V(0.0f); });
    // The sums and the fewer of weights and factors leave a register for one of the others.
    const auto add = [&](auto u, int64_t k, auto used) __attribute__((always_inline)) {
        const auto weight = [&](auto v, auto i)
                                __attribute__((always_inline)) { return Read::read(w + k * stride, v, i); };
        const auto factor = [&](auto r, auto i) __attribute__((always_inline)) { return V(x[r][k * step + i]); };
        const auto fma = [&](auto r, auto v, V f, V g) __attribute__((always_inline)) {
            sum[u][r][v] = xsimd::fma(f, g, sum[u][r][v]);
            settle(sum[u][r][v]);
        };
        unrolled<used>([&](auto i) __attribute__((always_inline)) {
            V kept[strip_vectors < rows ? strip_vectors : rows];
            if constexpr (strip_vectors < rows) {
                unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) { kept[v] = weight(v, i); });
                unrolled<rows>([&](auto r) __attribute__((always_inline)) {
                    const V f = factor(r, i);
                    unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) { fma(r, v, f, kept[v]); });
                });
            } else {
                unrolled<rows>([&](auto r) __attribute__((always_inline)) { kept[r] = factor(r, i); });
                unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) {
                    const V g = weight(v, i);
                    unrolled<rows>([&](auto r) __attribute__((always_inline)) { fma(r, v, kept[r], g); });
                });
            }
        });
    };
    constexpr std::integral_constant<int, int(step)> all;
    constexpr std::integral_constant<int, 0> one_chain;
    int64_t k = 0;
    for (; k + chains <= steps; k += chains) {
        if (fetches) {
            for (int64_t line = 0; line < strip_bytes; line += 64) __builtin_prefetch(w + k * stride + to_next + line);
        }
        unrolled<chains>([&](auto u) __attribute__((always_inline)) { add(u, k + u, all); });
    }
    for (; k < steps; ++k) add(one_chain, k, all);
    if (step > 1 && inputs % step != 0) add(one_chain, k, std::integral_constant<int, 1>());
    unrolled<rows>([&](auto r) __attribute__((always_inline)) {
        V out[strip_vectors];
        unrolled<strip_vectors>([&](auto v) __attribute__((always_inline)) {
            V total = sum[0][r][v];
            for (int u = 1; u < chains; ++u) total += sum[u][r][v];
            out[v] = total + V::load_unaligned(panels.bias + first + v * W);
        });
        write_strip<strip_vectors>(call, out, first, row + r);
    });
}

template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void multiply_strip(const ProductCall& call, int64_t first, int64_t row,
                                                          bool fetches_next) {
    if constexpr (type == WeightType::int8) {
        int8_strip_rows<strip_vectors, rows>(call, first, row, fetches_next);
    } else {
        strip_rows<type, strip_vectors, rows>(call, first, row, fetches_next);
    }
}

// A group of at most `rows` rows.
template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void multiply_group(const ProductCall& call, int64_t first, int64_t row,
                                                          int64_t count, bool fetches_next) {
    if constexpr (rows > 0) {
        if (count == rows) return multiply_strip<type, strip_vectors, rows>(call, first, row, fetches_next);
        multiply_group<type, strip_vectors, rows - 1>(call, first, row, count, fetches_next);
    }
}

// Strips outside, groups of rows inside: a strip is read from memory once, and from a cache for further groups. The
// first group fetches the next strip meanwhile. Groups are alike, because few sums wait for each other: four and four
// rows take less time than six and two.
template <WeightType type, int strip_vectors, int most_rows>
__attribute__((noinline)) void multiply_by(const ProductCall& call) {
    const int64_t groups = (call.rows + most_rows - 1) / most_rows;
    for (int64_t first = 0; first < call.panels.outputs; first += strip_vectors * W) {
        for (int64_t group = 0, row = 0; group < groups; ++group) {
            const int64_t end = call.rows * (group + 1) / groups;
            const bool fetches_next = group == 0 && first + strip_vectors * W < call.panels.outputs;
            multiply_group<type, strip_vectors, most_rows>(call, first, row, end - row, fetches_next);
            row = end;
        }
    }
}

void round_rows(const ProductCall& call) {
    const int64_t inputs = call.panels.inputs;
    for (int64_t row = 0; row < call.rows; ++row)
        round_row(call.x + row * call.x_stride, inputs, call.rounded + row * rounded_row_bytes(inputs));
}

// Few rows of narrow strips have too few sums.
template <WeightType type, int rows_of_wide>
void multiply_narrow(const ProductCall& call) {
    if (call.rows <= rows_of_wide) return multiply_by<type, wide_vectors, rows_of_wide>(call);
    multiply_by<type, narrow_vectors, rows_of_narrow>(call);
}

void multiply(const ProductCall& call) {
    switch (call.panels.type) {
        case WeightType::float32: return multiply_by<WeightType::float32, wide_vectors, rows_of_wide>(call);
        case WeightType::bfloat16: return multiply_narrow<WeightType::bfloat16, 2>(call);
        case WeightType::int8: return multiply_narrow<WeightType::int8, 1>(call);
    }
}

void pack(const Panels& panels, const float* weight, const float* bias) {
    const int64_t O = panels.outputs, K = panels.inputs;
    const int64_t padded = (O + panel_outputs - 1) / panel_outputs * panel_outputs;
    const int64_t pairs = (K + 1) / 2;
    for (int64_t o = 0; o < padded; ++o) {
        const float* row = o < O ? weight + o * K : nullptr;
        panels.bias[o] = row == nullptr || bias == nullptr ? 0.0f : bias[o];
        const int64_t panel = o / panel_outputs, lane = o % panel_outputs;
        if (panels.type == WeightType::float32) {
            float* at = static_cast<float*>(panels.weights) + panel * K * panel_outputs + lane;
            for (int64_t k = 0; k < K; ++k) at[k * panel_outputs] = row == nullptr ? 0.0f : row[k];
        } else if (panels.type == WeightType::bfloat16) {
            uint16_t* at = static_cast<uint16_t*>(panels.weights) + (panel * pairs * panel_outputs + lane) * 2;
            for (int64_t k = 0; k < 2 * pairs; ++k) {
                const float value = row == nullptr || k >= K ? 0.0f : row[k];
                at[k / 2 * panel_outputs * 2 + k % 2] = float_to_bfloat16(value);
            }
        } else {
            float most = 0.0f;
            for (int64_t k = 0; row != nullptr && k < K; ++k) {
                const float size = std::fabs(row[k]);
                if (!(size <= most)) most = size;
                if (size != size) break;  // NaN stays, whatever follows
            }
            panels.scale[o] = most / 127.0f;
            int8_t* at = static_cast<int8_t*>(panels.weights) + (panel * pairs * panel_outputs + lane) * 2;
            for (int64_t k = 0; k < 2 * pairs; ++k) {
                const float scaled = row == nullptr || k >= K || !(most > 0) ? 0.0f : row[k] / most * 127.0f;
                at[k / 2 * panel_outputs * 2 + k % 2] = int8_t(std::lrintf(scaled == scaled ? scaled : 0.0f));
            }
        }
    }
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
