// Products of few or many rows with a packed matrix.
//
// A strip is a part of a panel whose accumulators fit the registers with several rows'. int8 takes narrow strips for
// two rows and more, because a weight that was widened then serves more of them. One row of floats has several
// accumulators for each output, because one chain of additions would wait for its own latency.
#pragma once

#include "cpu_product_int8.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int least_accumulators = 8;

// The weights of a strip for `inputs` inputs at once.
template <WeightType type, int strip_vectors>
struct StripWeights;

template <int strip_vectors>
struct StripWeights<WeightType::float32, strip_vectors> {
    static constexpr int64_t inputs = 1, element_bytes = 4;
    V of_input[1][strip_vectors];
    inline __attribute__((always_inline)) explicit StripWeights(const char* at) {
        for (int v = 0; v < strip_vectors; ++v)
            of_input[0][v] = V::load_unaligned(reinterpret_cast<const float*>(at) + v * W);
    }
};

template <int strip_vectors>
struct StripWeights<WeightType::bfloat16, strip_vectors> {
    static constexpr int64_t inputs = 2, element_bytes = 2;
    using I = xsimd::batch<uint32_t, xsimd::default_arch>;
    V of_input[2][strip_vectors];
    inline __attribute__((always_inline)) explicit StripWeights(const char* at) {
        for (int v = 0; v < strip_vectors; ++v) {
            const I pair = I::load_unaligned(reinterpret_cast<const uint32_t*>(at) + v * W);
            of_input[0][v] = xsimd::bitwise_cast<float>(pair << 16);
            of_input[1][v] = xsimd::bitwise_cast<float>(pair & I(0xffff0000u));
        }
    }
};

template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void strip_rows(const ProductCall& call, int64_t first, int64_t row) {
    using Read = StripWeights<type, strip_vectors>;
    constexpr int chains = rows == 1 ? least_accumulators / strip_vectors : 1;
    constexpr int64_t step = Read::inputs;
    constexpr int64_t stride = panel_outputs * step * Read::element_bytes;
    const Panels& panels = call.panels;
    const int64_t inputs = panels.inputs, steps = inputs / step;
    const int64_t panel_bytes = (inputs + step - 1) / step * stride;
    const char* w = static_cast<const char*>(panels.weights) + first / panel_outputs * panel_bytes +
                    first % panel_outputs * step * Read::element_bytes;
    const float* x[rows];
    for (int r = 0; r < rows; ++r) x[r] = call.x + (row + r) * call.x_stride;
    V sum[chains][rows][strip_vectors];
    for (int u = 0; u < chains; ++u)
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < strip_vectors; ++v) sum[u][r][v] = V(0.0f);
    const auto add = [&](int u, int64_t k, auto used) __attribute__((always_inline)) {
        const Read read(w + k * stride);
        for (int i = 0; i < int(decltype(used)::value); ++i) {
            for (int r = 0; r < rows; ++r) {
                const V factor(x[r][k * step + i]);
                for (int v = 0; v < strip_vectors; ++v)
                    sum[u][r][v] = xsimd::fma(factor, read.of_input[i][v], sum[u][r][v]);
            }
        }
    };
    using All = std::integral_constant<int, int(step)>;
    int64_t k = 0;
    for (; k + chains <= steps; k += chains)
        for (int u = 0; u < chains; ++u) add(u, k + u, All());
    for (; k < steps; ++k) add(0, k, All());
    if (step > 1 && inputs % step != 0) add(0, k, std::integral_constant<int, 1>());
    for (int r = 0; r < rows; ++r) {
        V out[strip_vectors];
        for (int v = 0; v < strip_vectors; ++v) {
            V total = sum[0][r][v];
            for (int u = 1; u < chains; ++u) total += sum[u][r][v];
            out[v] = total + V::load_unaligned(panels.bias + first + v * W);
        }
        write_strip<strip_vectors>(call, out, first, row + r);
    }
}

template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void multiply_strip(const ProductCall& call, int64_t first, int64_t row) {
    if constexpr (type == WeightType::int8) {
        int8_strip_rows<strip_vectors, rows>(call, first, row);
    } else {
        strip_rows<type, strip_vectors, rows>(call, first, row);
    }
}

// The last rows of a product, of which there are at most `rows`.
template <WeightType type, int strip_vectors, int rows>
inline __attribute__((always_inline)) void last_rows(const ProductCall& call, int64_t first, int64_t row,
                                                     int64_t count) {
    if constexpr (rows > 0) {
        if (count == rows) return multiply_strip<type, strip_vectors, rows>(call, first, row);
        last_rows<type, strip_vectors, rows - 1>(call, first, row, count);
    }
}

// Strips outside, groups of rows inside: a strip is read from memory once, and from a cache for further groups.
template <WeightType type, int strip_vectors, int most_rows>
__attribute__((noinline)) void multiply_by(const ProductCall& call) {
    for (int64_t first = 0; first < call.panels.outputs; first += strip_vectors * W) {
        int64_t row = 0;
        for (; row + most_rows <= call.rows; row += most_rows)
            multiply_strip<type, strip_vectors, most_rows>(call, first, row);
        last_rows<type, strip_vectors, most_rows - 1>(call, first, row, call.rows - row);
    }
}

void multiply_int8(const ProductCall& call) {
    const int64_t inputs = call.panels.inputs;
    for (int64_t row = 0; row < call.rows; ++row)
        round_row(call.x + row * call.x_stride, inputs, call.rounded + row * rounded_row_bytes(inputs));
    if (call.rows == 1) return multiply_by<WeightType::int8, wide_vectors, 1>(call);
    multiply_by<WeightType::int8, narrow_vectors, rows_of_narrow>(call);
}

void multiply(const ProductCall& call) {
    switch (call.panels.type) {
        case WeightType::float32: return multiply_by<WeightType::float32, wide_vectors, rows_of_wide>(call);
        case WeightType::bfloat16: return multiply_by<WeightType::bfloat16, wide_vectors, rows_of_wide>(call);
        case WeightType::int8: return multiply_int8(call);
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
