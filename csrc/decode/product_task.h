// A team's products: a chunk is some panels of a matrix, for all rows.
#pragma once

#include <algorithm>

#include "cpu.h"
#include "team.h"

namespace depthlstm {
namespace decode {

// A chunk takes about this long: much longer than to claim it, and much shorter than a time slice.
constexpr double chunk_ns = 2000;

struct ProductTask {
    void (*multiply)(const ProductCall&);
    ProductCall call;
    int64_t outputs_each;  // of a chunk: whole panels

    int64_t chunk_floats() const { return call.rows * outputs_each; }

    void run(int64_t chunk, const Team::Worker& worker) const {
        const int64_t first = chunk * outputs_each;
        ProductCall part = call;
        part.panels.outputs = std::min(outputs_each, call.panels.outputs - first);
        part.panels.weights = static_cast<char*>(call.panels.weights) + first * weight_bytes(call.panels);
        part.panels.bias += first;
        if (part.panels.scale != nullptr) part.panels.scale += first;
        if (part.base != nullptr) part.base += first;
        part.y = worker.result == nullptr ? call.y + first : worker.result;
        if (worker.result != nullptr) part.y_stride = outputs_each;
        multiply(part);
    }

    void place(int64_t chunk, const float* result) const {
        const int64_t first = chunk * outputs_each, count = std::min(outputs_each, call.panels.outputs - first);
        for (int64_t row = 0; row < call.rows; ++row) {
            std::memcpy(call.y + row * call.y_stride + first, result + row * outputs_each, std::size_t(count) * 4);
        }
    }
};

// How long a panel takes: its way from memory, or its multiplications.
inline double panel_ns(const Panels& matrix, int64_t rows) {
    const double multiplications = double(rows * matrix.inputs * panel_outputs);
    const double ns = multiplications * (matrix.type == WeightType::int8 ? 0.015 : 0.03);
    return std::max(ns, double(weight_bytes(matrix) * panel_outputs) * 0.1);
}

// Whether a product is worth two chunks.
inline bool is_shared(const Panels& matrix, int64_t rows) {
    return panel_ns(matrix, rows) * double((matrix.outputs - 1) / panel_outputs) > chunk_ns;
}

inline void share_rows(Team& team, const DecodeKernels& kernels, const ProductCall& call) {
    const double ns = panel_ns(call.panels, call.rows);
    // helpers hold what the leader has not copied yet
    const int64_t held = (team.helpers() + 1) * Team::result_floats / 4 * 3 / call.rows;
    const int64_t most = std::max<int64_t>(held / panel_outputs, 2);
    const int64_t all = (call.panels.outputs + panel_outputs - 1) / panel_outputs;
    for (int64_t panel = 0; panel < all; panel += most) {
        const int64_t count = std::min(most, all - panel), first = panel * panel_outputs;
        const int64_t least = (count + Team::most_chunks - 1) / Team::most_chunks;
        const int64_t each = std::max({int64_t(chunk_ns / ns), least, int64_t(1)});
        ProductTask task{kernels.multiply, call, each * panel_outputs};
        Panels& panels = task.call.panels;
        panels.outputs = std::min(count * panel_outputs, panels.outputs - first);
        panels.weights = static_cast<char*>(panels.weights) + first * weight_bytes(panels);
        panels.bias += first;
        if (panels.scale != nullptr) panels.scale += first;
        if (call.base != nullptr) task.call.base += first;
        task.call.y += first;
        team.share(task, (count + each - 1) / each);
    }
}

inline void share_product(Team& team, const DecodeKernels& kernels, const ProductCall& call) {
    if (call.panels.type == WeightType::int8) kernels.round_rows(call);
    if (team.helpers() == 0 || !is_shared(call.panels, call.rows)) return kernels.multiply(call);
    // A chunk of more than 512 rows would not fit a helper's memory. No slice has one row alone, whose sums have
    // another order.
    const int64_t slices = (call.rows + 511) / 512;
    for (int64_t slice = 0, row = 0; slice < slices; ++slice) {
        const int64_t end = call.rows * (slice + 1) / slices;
        ProductCall part = call;
        part.rows = end - row;
        part.x += row * call.x_stride;
        if (part.base != nullptr) part.base += row * call.base_stride;
        part.y += row * call.y_stride;
        if (part.rounded != nullptr) part.rounded += row * rounded_row_bytes(call.panels.inputs);
        share_rows(team, kernels, part);
        row = end;
    }
}

}  // namespace decode
}  // namespace depthlstm
