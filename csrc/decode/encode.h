// The encoder, and the decoder's keys and values of its output.
#pragma once

#include "attention_tasks.h"

namespace depthlstm {
namespace decode {

// Token ids and mask of a source without its padded positions.
struct SourceTokens {
    std::vector<int32_t> ids, positions;
    std::vector<float> added;  // to the scores of a position
    bool has_mask = false;
};

class Encoder {
public:
    Encoder(const Model& model, Part& part, const std::vector<SourceTokens>& given, Team& team)
        : model(model), part(part), given(given), rows(model, kernels(), part.buffers, team) {}

    // Encodes some sources from `begin` on, of some hundred positions, and returns which one is next. What `memory_out`
    // names, with a row of D for each kept position, gets the encoder's output in place of the memories.
    int64_t run(int64_t begin, float* memory_out = nullptr) {
        const int64_t end = part.group_end(begin, rows.count);
        int64_t row = 0;
        for (int64_t source = begin; source < end; ++source) {
            const SourceTokens& tokens = given[part.first + source];
            for (int64_t t = 0; t < part.lengths[source]; ++t) {
                rows.embed(model.encoder, row++, tokens.ids[t], tokens.positions[t]);
                part.mask[part.memory_begin[source] + t] = tokens.added[t];
            }
        }
        for (const Branch& branch : model.encoder.branches) {
            rows.run(branch, [&](const Branch&) { attend(begin, end); }, [](const Branch&) {});
        }
        const float* out = rows.finish(model.encoder);
        if (memory_out != nullptr) {
            std::memcpy(memory_out, out, std::size_t(rows.count * model.features) * 4);
        } else {
            keep(out, begin, end);
        }
        return end;
    }

private:
    const Model& model;
    Part& part;
    const std::vector<SourceTokens>& given;
    Rows rows;

    const float* mask_of(int64_t source) const {
        return given[part.first + source].has_mask ? part.mask + part.memory_begin[source] : nullptr;
    }

    void attend(int64_t begin, int64_t end) {
        const int64_t all = model.heads * model.width;
        const float* projected = part.buffers.projected;
        float* out = part.buffers.context;
        for (int64_t source = begin; source < end; ++source) {
            const int64_t length = part.lengths[source];
            if (length == 0) continue;
            HeadsTask task{};
            task.attend = rows.kernels.attend_queries;
            task.call.mask = mask_of(source);
            task.call.positions = task.call.queries = task.positions = length;
            task.call.width = model.width;
            task.call.scale = model.attention_scale();
            task.call.query = projected;
            task.call.query_stride = task.stride = 3 * all;
            task.call.out = out;
            task.call.out_stride = all;
            task.keys = projected + all;
            task.to_values = all;
            task.block_stride = key_block * task.stride;
            task.group = 1;
            task.scratch = &part.scratch;
            share_heads(rows.team, task, model.heads);
            projected += length * 3 * all;
            out += length * all;
        }
    }

    // Keys and values of the encoder's output for every cross-attention, which all steps read.
    void keep(const float* out, int64_t begin, int64_t end) {
        const int64_t P = model.width, all = model.heads * P;
        Buffers& b = part.buffers;
        for (const Branch& branch : model.decoder.branches) {
            if (!branch.has_cross()) continue;
            rows.multiply(branch.cross_keys_values, out, model.features, b.projected, 2 * all);
            int64_t row = 0;
            for (int64_t source = begin; source < end; ++source) {
                const int64_t length = part.lengths[source], padded = round_up(length, key_block);
                float* keys = part.memory_of(model, source, branch.cross_place);
                for (int64_t head = 0; head < model.heads; ++head) {
                    const float* first = b.projected + row * 2 * all + head * P;
                    transpose_keys(first, 2 * all, length, P, keys + head * padded * P);
                    float* values = keys + padded * all + head * padded * P;
                    for (int64_t t = 0; t < length; ++t) {
                        std::memcpy(values + t * P, first + t * 2 * all + all, std::size_t(P) * 4);
                    }
                }
                row += length;
            }
        }
    }
};

}  // namespace decode
}  // namespace depthlstm
