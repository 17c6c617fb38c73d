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
    Search(const Model& model, const StateHead& head, Part& part, Team& team)
        : model(model), head(head), part(part), rows(model, kernels(), part.buffers, team) {
        const int64_t most = part.beams * std::min(2 * part.beams, model.decoder.vocabulary);
        if (part.beams > 1) candidates.reserve(std::size_t(most));  // the loop allocates nothing
        places.reserve(std::size_t(std::max(part.sources * part.beams, rows_at_once)));
    }

    // Every source at its first token, or at the last one of its prompt; none of them has been read.
    void start(const std::vector<SourceTokens>& given) {
        *part.progress = {part.sources, 0, -1, -1, 0, 0, 0};
        for (int64_t source = 0; source < part.sources; ++source) {
            const int64_t token = part.has_prompts ? given[part.first + source].ids.back() : model.bos;
            part.active[source] = int32_t(source);
            part.found[source] = 0;
            part.total[source] = 0;
            for (int64_t beam = 0; beam < part.beams; ++beam) {
                const int64_t row = source * part.beams + beam;
                part.tokens[row] = int32_t(token);
                part.live[row] = beam == 0 ? 0.0f : -INFINITY;  // all beams start alike, so one starts
                part.hypothesis_score[row] = -INFINITY;
                part.hypothesis_length[row] = 0;
            }
            if (part.beams == 1) continue;
            const int64_t row = source * part.beams;  // of the beam that starts; the others go on from it
            int32_t* slots = part.slots + row * part.capacity;
            std::fill(slots, slots + part.first_position(source), int32_t(row));
        }
    }

    // Keys and values of the prompts' next positions, up to their last tokens, which the first step reads.
    void read_prompts(const std::vector<SourceTokens>& given) {
        Progress& at = *part.progress;
        places.clear();
        for (; at.read_sources < part.sources; ++at.read_sources, at.read_positions = 0) {
            const int64_t source = at.read_sources;
            for (int64_t& t = at.read_positions; t < part.first_position(source); ++t) {
                if (int64_t(places.size()) == rows_at_once) return read_places();
                put(given[part.first + source].ids[t], source * part.beams, t);
            }
        }
        if (!places.empty()) read_places();
    }

    // At most `steps` tokens for every source that goes on. It stops where a logit is NaN, and says so in `progress`.
    void advance(int64_t steps) {
        Progress& at = *part.progress;
        for (int64_t i = 0; i < steps && at.active > 0 && at.bad_source < 0 && at.step < part.max_length; ++i) {
            step();
            if (part.beams == 1) {
                choose_greedily();
            } else {
                choose_beams();
            }
            ++at.step;
        }
    }

    // One step of a search whose tokens the caller chooses, by `tokens` of all sources but at the first step. Logits of
    // the next ones go to `logits` (sources, V); those of a source that has been given eos are left as they are.
    void step_by_hand(const int64_t* tokens, float* logits) {
        Progress& at = *part.progress;
        at.by_hand = 1;
        int64_t kept = 0;
        for (int64_t i = 0; i < at.active && tokens != nullptr; ++i) {
            const int32_t source = part.active[i];
            part.tokens[source] = int32_t(tokens[source]);
            if (tokens[source] != model.eos) part.active[kept++] = source;
        }
        if (tokens != nullptr) at.active = kept;
        if (at.active == 0) return;
        step();
        const int64_t V = model.decoder.vocabulary;
        for (int64_t i = 0; i < at.active; ++i) {
            std::memcpy(logits + part.active[i] * V, part.logits + i * V, std::size_t(V) * 4);
        }
        ++at.step;
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

    // Where a row's keys go: the row of the caches, and the position.
    struct Place {
        int64_t row, position;
    };
    std::vector<Place> places;

    // Rows of a source: one at the first step, where all beams are alike.
    int64_t rows_of_source() const { return part.progress->step == 0 ? 1 : part.beams; }

    // Puts a token into the next row.
    void put(int64_t token, int64_t row, int64_t position) {
        rows.embed(model.decoder, int64_t(places.size()), token, position);
        places.push_back({row, position});
    }

    // attend(branch) is what a self-attention does.
    template <class Attend>
    void run_branches(Attend attend) {
        rows.count = int64_t(places.size());
        for (const Branch& branch : model.decoder.branches) {
            rows.run(branch, attend, [&](const Branch& b) { attend_cross(b); });
        }
    }

    void read_places() {
        run_branches([&](const Branch& branch) { attend_prompts(branch); });
    }

    // The logits of the next token of every active row.
    void step() {
        const int64_t each = rows_of_source();
        places.clear();
        for (int64_t i = 0; i < part.progress->active; ++i) {
            const int64_t source = part.active[i], position = part.first_position(source) + part.progress->step;
            for (int64_t row = source * part.beams; row < source * part.beams + each; ++row) {
                keep_offsets(row, position);
                put(part.tokens[row], row, position);
            }
        }
        run_branches([&](const Branch& branch) { attend_self(branch); });
        const float* out = rows.finish(model.decoder);
        rows.multiply(model.output, out, model.features, part.logits, model.decoder.vocabulary);
    }

    // Where the positions of the next row lie in every layer's caches.
    void keep_offsets(int64_t row, int64_t position) {
        const int64_t at = int64_t(places.size());
        const int32_t* slots = part.beams > 1 ? part.slots + row * part.capacity : nullptr;
        int64_t* offsets = part.offsets + at * part.capacity;
        for (int64_t t = 0; t < position; ++t) offsets[t] = offset(t, slots == nullptr ? row : slots[t]);
        offsets[position] = offset(position, row);
        part.row_positions[at] = position + 1;
        part.row_sources[at] = int32_t(row / part.beams);
    }

    int64_t offset(int64_t t, int64_t row) const {
        return t / key_block * part.chunk_floats(model) + (row * key_block + t % key_block) * model.key_floats();
    }

    // Turns features j and j + size / 2 of each head by the angle of the position.
    void rotate(float* heads, int64_t count, int64_t position) const {
        const int64_t half = model.head_size / 2;
        const float *cos = model.rotation + position * model.head_size, *sin = cos + half;
        for (float* head = heads; head < heads + count * model.width; head += model.width) {
            for (int64_t j = 0; j < half; ++j) {
                const float first = head[j], second = head[j + half];
                head[j] = first * cos[j] - second * sin[j];
                head[j + half] = second * cos[j] + first * sin[j];
            }
        }
    }

    float* keys_of(const Branch& branch) const { return part.cache + branch.self_place * 2 * part.layer_floats(model); }

    // Puts keys and values of a row of `projected` into the cache.
    void keep(const Branch& branch, int64_t i) {
        const int64_t all = model.heads * model.width, of_keys = model.key_floats();
        float* projected = part.buffers.projected + i * model.self_floats();
        if (model.has_rotation) rotate(projected, model.heads + model.key_heads, places[i].position);
        float* keys = keys_of(branch) + offset(places[i].position, places[i].row);
        std::memcpy(keys, projected + all, std::size_t(of_keys) * 4);
        std::memcpy(keys + part.layer_floats(model), projected + all + of_keys, std::size_t(of_keys) * 4);
    }

    void attend_self(const Branch& branch) {
        const int64_t all = model.heads * model.width;
        int64_t most = 0;
        for (int64_t i = 0; i < rows.count; ++i) {
            keep(branch, i);
            most = std::max(most, part.row_positions[i]);
        }
        CacheTask task{};
        task.attend = rows.kernels.attend_cache;
        task.call.query = part.buffers.projected;
        task.call.keys = keys_of(branch);
        task.call.values = task.call.keys + part.layer_floats(model);
        task.call.offsets = part.offsets;
        task.call.heads = model.heads;
        task.call.width = model.width;
        task.call.group = model.heads / model.key_heads;
        task.call.scale = model.attention_scale();
        task.query_stride = model.self_floats();
        task.offsets_stride = part.capacity;
        task.positions = part.row_positions;
        task.scratch = &part.scratch;
        set_rows(task, all, most);
        rows.team.share(task, task.chunks());
    }

    void set_rows(ContextRows& task, int64_t floats, int64_t positions) const {
        task.out = part.buffers.context;
        task.rows = rows.count;
        task.rows_each = rows_of_chunk(rows.count, positions, floats);
        task.floats = floats;
    }

    // Rows of one prompt lie side by side, in the order of their positions.
    void attend_prompts(const Branch& branch) {
        const int64_t P = model.width, all = model.heads * P;
        for (int64_t i = 0; i < rows.count; ++i) keep(branch, i);
        for (int64_t begin = 0, end = 0; begin < rows.count; begin = end) {
            while (end < rows.count && places[end].row == places[begin].row) ++end;
            HeadsTask task{};
            task.attend = rows.kernels.attend_queries;
            task.call.positions = places[begin].position + 1;
            task.call.queries = end - begin;
            task.call.later = 1;
            task.call.width = P;
            task.call.scale = model.attention_scale();
            task.call.query = part.buffers.projected + begin * model.self_floats();
            task.call.query_stride = model.self_floats();
            task.call.out = part.buffers.context + begin * all;
            task.call.out_stride = all;
            task.keys = keys_of(branch) + offset(0, places[begin].row);
            task.to_values = part.layer_floats(model);
            task.stride = model.key_floats();
            task.block_stride = part.chunk_floats(model);
            task.positions = places[end - 1].position + 1;
            task.group = model.heads / model.key_heads;
            task.scratch = &part.scratch;
            share_heads(rows.team, task, model.key_heads);
        }
    }

    void attend_cross(const Branch& branch) {
        const int64_t all = model.heads * model.width;
        int64_t most = 1;
        for (int64_t i = 0; i < rows.count; ++i) most = std::max<int64_t>(most, part.lengths[part.row_sources[i]]);
        CrossTask task{};
        task.attend = rows.kernels.attend_blocks;
        task.model = &model;
        task.part = &part;
        task.cross_place = branch.cross_place;
        task.query = part.buffers.projected;
        set_rows(task, all, most);
        rows.team.share(task, task.chunks());
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
        reorder(source, said, parents, part.first_position(source) + t);
        return true;
    }

    // Row i goes on from row parents[i]: no key moves.
    void reorder(int64_t source, const int32_t* said, const int32_t* parents, int64_t t) {
        const int64_t beams = part.beams, longest = part.capacity;
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
