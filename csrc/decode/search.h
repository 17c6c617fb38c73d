// The decoder's steps, and greedy and beam search over them.
//
// The searches follow depthlstm_fast/reference/generation.py, down to the order of equal scores and to float32 where
// scores are compared.
#pragma once

#include "encode.h"

namespace depthlstm {
namespace decode {

class Search {
public:
    Search(const Model& model, const StateHead& head, Part& part)
        : model(model), head(head), part(part), rows(model, kernels(), part.buffers) {
        const int64_t most = part.beams * std::min(2 * part.beams, model.decoder.vocabulary);
        if (part.beams > 1) candidates.reserve(std::size_t(most));  // the loop allocates nothing
    }

    // Every source at its first token.
    void start() {
        *part.progress = {part.sources, 0, -1, -1};
        for (int64_t source = 0; source < part.sources; ++source) {
            part.active[source] = int32_t(source);
            part.found[source] = 0;
            part.total[source] = 0;
            for (int64_t beam = 0; beam < part.beams; ++beam) {
                const int64_t row = source * part.beams + beam;
                part.tokens[row] = int32_t(model.bos);
                part.live[row] = beam == 0 ? 0.0f : -INFINITY;  // all beams start alike, so one starts
                part.hypothesis_score[row] = -INFINITY;
                part.hypothesis_length[row] = 0;
            }
        }
    }

    // At most `steps` tokens for every source that goes on. It stops where a logit is NaN, and says so in `progress`.
    void advance(int64_t steps) {
        Progress& at = *part.progress;
        for (int64_t i = 0; i < steps && at.active > 0 && at.bad_source < 0; ++i) {
            step();
            if (part.beams == 1) {
                choose_greedily();
            } else {
                choose_beams();
            }
            ++at.step;
        }
    }

private:
    struct Candidate {
        float score;
        int32_t beam, token;
    };

    const Model& model;
    const StateHead& head;
    Part& part;
    Rows rows;
    std::vector<Candidate> candidates;  // of one source

    // Rows of a source: one at the first step, where all beams are alike.
    int64_t rows_of_source() const { return part.progress->step == 0 ? 1 : part.beams; }

    // The logits of the next token of every active row.
    void step() {
        const int64_t t = part.progress->step, each = rows_of_source();
        rows.count = part.progress->active * each;
        for (int64_t row = 0; row < rows.count; ++row) {
            rows.embed(model.decoder, row, part.tokens[place_of(row, each)], t);
        }
        for (const Branch& branch : model.decoder.branches) {
            rows.run(
                branch, [&](const Branch& b) { attend_self(b, t, each); },
                [&](const Branch& b) { attend_cross(b, each); });
        }
        const float* out = rows.finish(model.decoder);
        rows.multiply(model.output, out, model.features, part.logits, model.decoder.vocabulary);
    }

    // The row of the caches that an active row has.
    int64_t place_of(int64_t row, int64_t each) const {
        return int64_t(part.active[row / each]) * part.beams + row % each;
    }

    int64_t offset(int64_t t, int64_t place) const {
        return t / key_block * part.chunk_floats(model) + (place * key_block + t % key_block) * Part::row_floats(model);
    }

    void attend_self(const Branch& branch, int64_t t, int64_t each) {
        const int64_t all = Part::row_floats(model);
        float* keys = part.cache + branch.self_place * 2 * part.layer_floats(model);
        float* values = keys + part.layer_floats(model);
        CacheAttention call;
        call.keys = keys;
        call.values = values;
        call.offsets = part.offsets;
        call.positions = t + 1;
        call.heads = model.heads;
        call.width = model.width;
        call.scale = float(1 / std::sqrt(double(model.head_size)));
        call.scores = part.buffers.scores;
        for (int64_t row = 0; row < rows.count; ++row) {
            const int64_t place = place_of(row, each);
            const float* projected = part.buffers.projected + row * 3 * all;
            const int64_t own = offset(t, place);
            std::memcpy(keys + own, projected + all, std::size_t(all) * 4);
            std::memcpy(values + own, projected + 2 * all, std::size_t(all) * 4);
            const int32_t* slots = part.beams > 1 ? part.slots + place * part.max_length : nullptr;
            for (int64_t i = 0; i < t; ++i) part.offsets[i] = offset(i, slots == nullptr ? place : slots[i]);
            part.offsets[t] = own;
            call.query = projected;
            call.out = part.buffers.context + row * all;
            rows.kernels.attend_cache(call);
        }
    }

    void attend_cross(const Branch& branch, int64_t each) {
        const int64_t P = model.width, all = model.heads * P;
        BlockAttention call;
        call.width = P;
        call.scale = float(1 / std::sqrt(double(model.head_size)));
        call.scores = part.buffers.scores;
        for (int64_t row = 0; row < rows.count; ++row) {
            const int64_t source = part.active[row / each], length = part.lengths[source];
            const int64_t padded = round_up(length, key_block);
            const float* keys = part.memory_of(model, source, branch.cross_place);
            call.mask = part.mask + part.memory_begin[source];
            call.positions = length;
            for (int64_t h = 0; h < model.heads; ++h) {
                call.query = part.buffers.projected + row * all + h * P;
                call.keys = keys + h * padded * P;
                call.values = keys + padded * all + h * padded * P;
                call.out = part.buffers.context + row * all + h * P;
                rows.kernels.attend_blocks(call);
            }
        }
    }

    float penalty(int64_t length) const { return float(std::pow((5.0 + double(length)) / 6.0, head.alpha)); }

    void fail(int64_t source) {
        if (part.progress->bad_source >= 0) return;
        part.progress->bad_source = part.first + source;
        part.progress->bad_step = part.progress->step + 1;
    }

    void choose_greedily() {
        Progress& at = *part.progress;
        const int64_t V = model.decoder.vocabulary, length = at.step + 1;
        int64_t kept = 0;
        for (int64_t i = 0; i < at.active; ++i) {
            const int64_t source = part.active[i];
            const float* logits = part.logits + i * V;
            const int64_t token = rows.kernels.largest(logits, V);
            // a log-softmax with an infinite largest value is NaN
            if (token < 0 || std::isinf(logits[token])) return fail(source);
            if (head.wants_scores != 0) {
                float most;
                part.total[source] -= double(rows.kernels.log_sum(logits, V, &most));
            }
            part.said[source * part.max_length + at.step] = part.tokens[source] = int32_t(token);
            if (token == model.eos || length == part.max_length) {
                part.hypothesis_length[source] = int32_t(length);
                part.hypothesis_score[source] = float(part.total[source]) / penalty(length);
            } else {
                part.active[kept++] = int32_t(source);
            }
        }
        at.active = kept;
    }

    void choose_beams() {
        Progress& at = *part.progress;
        const int64_t V = model.decoder.vocabulary, each = rows_of_source(), wanted = 2 * part.beams;
        int64_t kept = 0;
        for (int64_t i = 0; i < at.active; ++i) {
            const int64_t source = part.active[i];
            candidates.clear();
            for (int64_t beam = 0; beam < each; ++beam) {
                const float* logits = part.logits + (i * each + beam) * V;
                float most;
                const float log_sum = rows.kernels.log_sum(logits, V, &most);
                if (std::isnan(log_sum)) return fail(source);
                const float live = part.live[source * part.beams + beam];
                if (live == -INFINITY) continue;
                float* values = part.top_values;
                const int64_t count = rows.kernels.top(logits, V, wanted, values, part.top_tokens);
                for (int64_t j = 0; j < count; ++j) {
                    const float logp = (values[j] - most) - log_sum;
                    candidates.push_back({live + logp, int32_t(beam), part.top_tokens[j]});
                }
            }
            std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
                return a.score != b.score ? a.score > b.score : a.beam != b.beam ? a.beam < b.beam : a.token < b.token;
            });
            if (int64_t(candidates.size()) > wanted) candidates.resize(std::size_t(wanted));
            if (advance_source(source)) part.active[kept++] = int32_t(source);
        }
        at.active = kept;
    }

    // Takes what ends, lets the rest go on; returns whether the source does.
    bool advance_source(int64_t source) {
        const int64_t beams = part.beams, t = part.progress->step, length = t + 1;
        const bool is_last = length == part.max_length;
        int64_t ended = 0;
        for (int64_t j = 0; j < std::min<int64_t>(beams, int64_t(candidates.size())); ++j) {
            const Candidate& each = candidates[j];
            if ((each.token != model.eos && !is_last) || each.score == -INFINITY) continue;
            ++ended;
            keep_hypothesis(source, each, length);
        }
        part.found[source] += int32_t(ended);
        if (part.found[source] >= beams || is_last) return false;
        int32_t* said = part.said + (source * part.max_length + t) * beams;
        int32_t* parents = part.parents + (source * part.max_length + t) * beams;
        int64_t row = 0;
        for (const Candidate& each : candidates) {
            if (row == beams) break;
            if (each.token == model.eos) continue;
            said[row] = each.token;
            parents[row] = each.beam;
            part.live[source * beams + row++] = each.score;
        }
        for (; row < beams; ++row) {  // too few candidates: rows that never come back
            said[row] = int32_t(model.pad);
            parents[row] = 0;
            part.live[source * beams + row] = -INFINITY;
        }
        reorder(source, said, parents, t);
        return true;
    }

    // Row i goes on from row parents[i]: no key moves.
    void reorder(int64_t source, const int32_t* said, const int32_t* parents, int64_t t) {
        const int64_t beams = part.beams, longest = part.max_length;
        int32_t* slots = part.slots + source * beams * longest;
        for (int64_t row = 0; row < beams; ++row) {
            int32_t* to = part.next_slots + row * longest;
            std::memcpy(to, slots + parents[row] * longest, std::size_t(t) * 4);
            to[t] = int32_t(source * beams + parents[row]);
            part.tokens[source * beams + row] = said[row];
        }
        for (int64_t row = 0; row < beams; ++row) {
            std::memcpy(slots + row * longest, part.next_slots + row * longest, std::size_t(t + 1) * 4);
        }
    }

    // Puts a hypothesis among the best of its source, behind those of its score; the worst falls out.
    void keep_hypothesis(int64_t source, const Candidate& last, int64_t length) {
        const int64_t beams = part.beams, longest = part.max_length;
        float* scores = part.hypothesis_score + source * beams;
        int32_t* lengths = part.hypothesis_length + source * beams;
        int32_t* all = part.hypotheses + source * beams * longest;
        const float score = last.score / penalty(length);
        int64_t at = 0;
        while (at < beams && !(score > scores[at])) ++at;
        if (at == beams) return;
        for (int64_t i = beams - 1; i > at; --i) {
            scores[i] = scores[i - 1];
            lengths[i] = lengths[i - 1];
            std::memcpy(all + i * longest, all + (i - 1) * longest, std::size_t(lengths[i]) * 4);
        }
        scores[at] = score;
        lengths[at] = int32_t(length);
        int32_t* to = all + at * longest;
        to[length - 1] = last.token;
        int64_t beam = last.beam;
        for (int64_t t = length - 2; t >= 0; --t) {
            const int64_t row = (source * longest + t) * beams + beam;
            to[t] = part.said[row];
            beam = part.parents[row];
        }
    }
};

}  // namespace decode
}  // namespace depthlstm
