// Branches over rows: the buffers of one part, and what encoder and decoder do alike.
#pragma once

#include "model.h"
#include "product_task.h"

namespace depthlstm {
namespace decode {

// Buffers for some rows. [x | h] is one buffer, which a cell reads at once: h begins behind the widest input, and a
// branch writes right before it.
struct Buffers {
    int64_t stride = 0;  // of xh
    float *xh, *c, *read, *s, *projected, *context, *inner, *hidden, *z;
    char *gates_scratch, *rounded;

    Buffers(Arena& arena, const Model& model, int64_t rows) {
        const int64_t D = model.features, heads_width = model.heads * model.width;
        stride = model.most_input + D;
        xh = arena.take<float>(rows * stride);
        c = arena.take<float>(rows * D);
        read = arena.take<float>(rows * D);
        s = arena.take<float>(rows * D);
        projected = arena.take<float>(rows * std::max(model.self_floats(), 2 * heads_width));
        context = arena.take<float>(rows * heads_width);
        inner = arena.take<float>(rows * model.most_inner);
        hidden = arena.take<float>(rows * D);
        z = arena.take<float>(rows * 4 * D);
        int64_t scratch = 0;
        for (const Cell& cell : model.cells) {
            scratch = std::max(scratch, Model::kernels_of_gates().scratch_bytes(model.gates_call(cell)));
        }
        gates_scratch = arena.take<char>(scratch);
        int64_t rounded_bytes = 0;
        for (const Panels& matrix : model.matrices) {
            if (matrix.type != WeightType::int8) continue;
            rounded_bytes = std::max(rounded_bytes, rounded_row_bytes(matrix.inputs));
        }
        rounded = arena.take<char>(rows * rounded_bytes);
    }
};

// Runs the branches of a stack for rows of a buffer.
class Rows {
public:
    Rows(const Model& model, const DecodeKernels& kernels, Buffers& buffers, Team& team)
        : model(model), kernels(kernels), buffers(buffers), team(team), gates(Model::kernels_of_gates()) {}

    const Model& model;
    const DecodeKernels& kernels;
    Buffers& buffers;
    Team& team;
    int64_t count = 0;

    float* h() const { return buffers.xh + model.most_input; }

    // The embedded token, at a position if the stack has any, into a row of h, and the initial cell.
    void embed(const Stack& stack, int64_t row, int64_t token, int64_t position) {
        const int64_t D = model.features;
        const float scale = float(std::sqrt(double(D)));
        const float* embedded = stack.embedding + token * D;
        float* to = h() + row * buffers.stride;
        for (int64_t d = 0; d < D; ++d) to[d] = embedded[d] * scale;
        if (stack.positions != nullptr) {
            const float* placed = stack.positions + position * D;
            for (int64_t d = 0; d < D; ++d) to[d] += placed[d];
        }
        float* c = buffers.c + row * D;
        if (stack.initial_cell == nullptr) {
            std::memset(c, 0, std::size_t(D) * 4);
        } else {
            std::memcpy(c, stack.initial_cell, std::size_t(D) * 4);
        }
    }

    void multiply(int64_t matrix, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                  const float* base = nullptr, int64_t base_stride = 0) {
        share_product(team, kernels,
                      {model.matrices[matrix], x, x_stride, base, base_stride, y, y_stride, count, buffers.rounded});
    }

    void normalise(int64_t norm, const float* x, int64_t x_stride, float* y, int64_t y_stride) {
        const Norm& n = model.norms[norm];
        kernels.normalise({count, n.features, n.rms, n.eps, n.weight, n.bias, x, x_stride, y, y_stride});
    }

    // The stack's output into `read`, with stride D.
    const float* finish(const Stack& stack) {
        const int64_t D = model.features;
        if (stack.norm >= 0) {
            normalise(stack.norm, h(), buffers.stride, buffers.read, D);
        } else {
            copy(h(), buffers.stride, buffers.read, D);
        }
        return buffers.read;
    }

    // self(branch) and cross(branch) turn `projected` into `context`.
    template <class Self, class Cross>
    void run(const Branch& branch, Self self, Cross cross) {
        const int64_t D = model.features, stride = buffers.stride, heads_width = model.heads * model.width;
        const bool has_cell = branch.cell >= 0;
        const float* from = h();
        int64_t from_stride = stride;
        if (branch.read_norm >= 0) {
            normalise(branch.read_norm, h(), stride, buffers.read, D);
            from = buffers.read;
            from_stride = D;
        }
        const bool both = branch.kind == Kind::concatenated;
        float* to = has_cell ? h() - (both ? 2 * D : D) : h();
        const float* base = has_cell ? nullptr : h();
        if (branch.kind == Kind::network) {
            const int64_t inner = model.matrices[branch.network_in].outputs;
            multiply(branch.network_in, from, from_stride, buffers.inner, inner);
            if (branch.is_gated) {
                gate(branch.activation, inner);
            } else {
                kernels.activate(branch.activation, buffers.inner, count * inner);
            }
            multiply(branch.network_out, buffers.inner, inner, to, stride, base, stride);
        }
        if (branch.has_self()) {
            multiply(branch.self_in, from, from_stride, buffers.projected, model.self_floats());
            self(branch);
            if (branch.kind == Kind::self) {
                multiply(branch.self_out, buffers.context, heads_width, to, stride, base, stride);
            } else {
                // s, which the cross-attention reads
                multiply(branch.self_out, buffers.context, heads_width, both ? to : buffers.s, both ? stride : D);
                from = both ? to : buffers.s;
                from_stride = both ? stride : D;
            }
        }
        if (branch.has_cross()) {
            multiply(branch.cross_query, from, from_stride, buffers.projected, heads_width);
            cross(branch);
            if (branch.kind == Kind::added && has_cell) {
                base = buffers.s;
                multiply(branch.cross_out, buffers.context, heads_width, to, stride, base, D);
            } else {
                multiply(branch.cross_out, buffers.context, heads_width, both ? to + D : to, stride, base, stride);
                if (branch.kind == Kind::added) add(buffers.s);
            }
        }
        if (has_cell) step(model.cells[branch.cell]);
    }

private:
    const GatesKernels& gates;

    void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
        for (int64_t row = 0; row < count; ++row) {
            std::memcpy(to + row * to_stride, from + row * from_stride, std::size_t(model.features) * 4);
        }
    }

    void add(const float* s) {
        const int64_t D = model.features;
        for (int64_t row = 0; row < count; ++row) {
            for (int64_t d = 0; d < D; ++d) h()[row * buffers.stride + d] += s[row * D + d];
        }
    }

    // The first half of each inner row becomes act(first half) * second half.
    void gate(Activation activation, int64_t inner) {
        const int64_t half = inner / 2;
        for (int64_t row = 0; row < count; ++row) {
            float* of_row = buffers.inner + row * inner;
            kernels.activate(activation, of_row, half);
            for (int64_t i = 0; i < half; ++i) of_row[i] *= of_row[half + i];
        }
    }

    // (h, c) = cell([x | h], c)
    void step(const Cell& cell) {
        const int64_t D = model.features, stride = buffers.stride;
        const float* x = h() - model.cell_input(cell);
        GatesCall call = model.gates_call(cell);
        if (cell.has_network()) {
            const int64_t inner = model.matrices[cell.ffn_in].outputs;
            multiply(cell.ffn_in, x, stride, buffers.inner, inner);
            normalise(cell.ffn_norm, buffers.inner, inner, buffers.inner, inner);
            kernels.activate(cell.activation, buffers.inner, count * inner);
            multiply(cell.ffn_out, buffers.inner, inner, buffers.hidden, D);
            call.hidden = {buffers.hidden, D};
        }
        const int64_t wide = model.matrices[cell.gates].outputs;
        multiply(cell.gates, x, stride, buffers.z, wide);
        call.rows = count;
        call.z = {buffers.z, wide};
        call.c = {buffers.c, D};
        call.h = {h(), stride};
        call.c_out = {buffers.c, D};
        gates.forward(call, cell.packed, buffers.gates_scratch, 0, count);
    }
};

}  // namespace decode
}  // namespace depthlstm
