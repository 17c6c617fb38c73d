// The state of a search in one uint8 tensor: a head, the lengths of the sources or prompts, and an arena for each
// part, which a team of threads runs. A language model's sources are its prompts: they have keys in the caches, and no
// memory.
#pragma once

#include "blob.h"
#include "rows.h"

namespace depthlstm {
namespace decode {

constexpr char state_magic[8] = {'d', 'l', 's', 't', 'm', 's', 'e', 'a'};
constexpr int64_t rows_at_once = 256;  // of sources or prompts, which read a matrix once; more would take more memory

struct StateHead {
    char magic[8];
    int64_t bytes;
    uint64_t model;  // the blob's head_sum
    int64_t sources, beams, max_length, parts, threads, wants_scores;
    double alpha;
    uint64_t given;  // a sum of the sources or prompts, and of their mask
    uint64_t sum;    // of the head up to here, and of the lengths
};
static_assert(sizeof(StateHead) <= 128);
constexpr int64_t lengths_begin = 128;

// What changes in a part from call to call besides its arrays.
struct Progress {
    int64_t active, step, bad_source, bad_step;
    int64_t read_sources, read_positions;  // of the sources or prompts: whole ones, and of the next prompt
    int64_t by_hand;                       // 1: the caller has chosen tokens
};

// Scratch of a worker's attention: scores, and a head's keys and values as blocks.
struct AttentionScratch {
    float* leader;
    int64_t keys_at, values_at, floats;

    AttentionScratch(Arena& arena, const Model& model, int64_t positions, int64_t longest)
        : keys_at(std::max(model.heads, most_queries_at_once) * round_up(positions, key_block)),
          values_at(keys_at + round_up(longest, key_block) * model.width),
          floats(2 * values_at - keys_at) {
        leader = arena.take<float>(floats);
    }

    float* of(const Team::Worker& worker) const { return worker.scratch == nullptr ? leader : worker.scratch; }
};

// Some sources: their memories, caches, hypotheses and buffers.
struct Part {
    int64_t first, sources, beams, max_length, helpers;
    bool has_prompts;
    const int32_t* lengths;    // of each source, without padded positions
    int64_t capacity, chunks;  // positions of a row's cache, and blocks of them
    std::vector<int64_t> memory_begin;
    Progress* progress;
    int32_t *active, *tokens;
    float* live;
    int32_t *slots, *next_slots;              // row that position t of a row lies in
    int32_t *said, *parents;                  // (sources, max_length, beams)
    int32_t *hypotheses, *hypothesis_length;  // (sources, beams, max_length)
    int32_t* found;
    float* hypothesis_score;
    double* total;
    float *mask, *memory, *cache, *logits, *top_values;
    int32_t* top_tokens;
    // Of each row of a step: its source, how many positions it attends to, and where they lie in the caches. Helpers
    // read old values as well, so none may ever point outside.
    int32_t* row_sources;
    int64_t *row_positions, *offsets;
    Buffers buffers;
    AttentionScratch scratch;

    // Lays the part out in the arena. Zero-length arrays cost nothing; pages that no step reaches are never touched.
    Part(Arena& arena, const Model& model, int64_t first, int64_t sources, int64_t beams, int64_t max_length,
         const int32_t* lengths, int64_t helpers)
        : first(first),
          sources(sources),
          beams(beams),
          max_length(max_length),
          helpers(helpers),
          has_prompts(!model.has_encoder()),
          lengths(lengths),
          capacity(max_length + (has_prompts ? longest() - 1 : 0)),
          chunks(round_up(capacity, key_block) / key_block),
          progress(arena.take<Progress>(1)),
          active(arena.take<int32_t>(sources)),
          tokens(arena.take<int32_t>(sources * beams)),
          live(arena.take<float>(sources * beams)),
          slots(arena.take<int32_t>(beams > 1 ? sources * beams * capacity : 0)),
          next_slots(arena.take<int32_t>(beams > 1 ? beams * capacity : 0)),
          said(arena.take<int32_t>(sources * max_length * beams)),
          parents(arena.take<int32_t>(beams > 1 ? sources * max_length * beams : 0)),
          hypotheses(arena.take<int32_t>(beams > 1 ? sources * beams * max_length : 0)),
          hypothesis_length(arena.take<int32_t>(sources * beams)),
          found(arena.take<int32_t>(sources)),
          hypothesis_score(arena.take<float>(sources * beams)),
          total(arena.take<double>(sources)),
          mask(take_memory(arena, model)),
          memory(arena.take<float>(memory_begin[sources] * memory_floats(model))),
          cache(arena.take<float>(chunks * chunk_floats(model))),
          logits(arena.take<float>(sources * beams * model.decoder.vocabulary)),
          top_values(arena.take<float>(beams > 1 ? 2 * beams : 0)),
          top_tokens(arena.take<int32_t>(beams > 1 ? 2 * beams : 0)),
          row_sources(arena.take<int32_t>(sources * beams)),
          row_positions(arena.take<int64_t>(sources * beams)),
          offsets(arena.take<int64_t>(sources * beams * capacity)),
          buffers(arena, model, std::max(sources * beams, input_rows())),
          scratch(arena, model, std::max(capacity, longest()), longest()) {}

    int64_t longest() const {
        int64_t most = 0;
        for (int64_t source = 0; source < sources; ++source) most = std::max<int64_t>(most, lengths[source]);
        return most;
    }

    // Where the first token that a step reads stands: a prompt's last one, whose predecessors have keys by then.
    int64_t first_position(int64_t source) const { return has_prompts ? lengths[source] - 1 : 0; }

    // The end of a group of sources from `begin` on that the encoder runs at once.
    int64_t group_end(int64_t begin, int64_t& rows) const {
        rows = lengths[begin];
        int64_t end = begin + 1;
        while (end < sources && rows + lengths[end] <= rows_at_once) rows += lengths[end++];
        return end;
    }

    // A source's keys of a cross-attention; its values lie behind them.
    float* memory_of(const Model& model, int64_t source, int64_t place) const {
        const int64_t padded = round_up(lengths[source], key_block);
        return memory + memory_begin[source] * memory_floats(model) + place * 2 * padded * model.heads * model.width;
    }

    int64_t layer_floats(const Model& model) const { return sources * beams * key_block * model.key_floats(); }
    // Keys and values of key_block positions of all layers and rows.
    int64_t chunk_floats(const Model& model) const { return model.decoder.self_attentions * 2 * layer_floats(model); }

private:
    static int64_t memory_floats(const Model& model) {
        return model.decoder.cross_attentions * 2 * model.heads * model.width;
    }
    // The most rows of sources or prompts at once.
    int64_t input_rows() const {
        int64_t most = 0, rows = 0;
        if (has_prompts) {
            for (int64_t source = 0; source < sources; ++source) rows += lengths[source] - 1;
            return std::min(rows, rows_at_once);
        }
        for (int64_t begin = 0; begin < sources; most = std::max(most, rows)) begin = group_end(begin, rows);
        return most;
    }
    float* take_memory(Arena& arena, const Model&) {
        memory_begin.assign(std::size_t(sources) + 1, 0);
        for (int64_t source = 0; source < sources; ++source) {
            memory_begin[source + 1] = memory_begin[source] + (has_prompts ? 0 : round_up(lengths[source], key_block));
        }
        return arena.take<float>(memory_begin[sources]);
    }
};

// A search's parts, found in a state tensor or laid out for one that does not exist yet (base null).
struct State {
    StateHead head;
    std::vector<Part> parts;
    int64_t bytes;

    State(const Model& model, const StateHead& head, const int32_t* lengths, char* base) : head(head) {
        Arena arena(base);
        arena.take<char>(lengths_begin);
        arena.take<int32_t>(head.sources);
        for (int64_t part = 0; part < head.parts; ++part) {
            const int64_t begin = head.sources * part / head.parts, end = head.sources * (part + 1) / head.parts;
            const int64_t helpers = (head.threads - part + head.parts - 1) / head.parts - 1;  // as run_parts has them
            arena.take<char>(4096);  // two threads' memory apart
            parts.emplace_back(arena, model, begin, end - begin, head.beams, head.max_length, lengths + begin, helpers);
        }
        bytes = arena.used();
    }
};

inline uint64_t state_sum(const StateHead& head, const char* base) {
    return checksum(base + lengths_begin, head.sources * 4, checksum(&head, int64_t(offsetof(StateHead, sum))));
}

inline uint64_t model_sum(const Tensor& blob) {
    return static_cast<const BlobHead*>(blob.const_data_ptr())->head_sum ^
           static_cast<const BlobHead*>(blob.const_data_ptr())->weights_sum;
}

inline State open_state(const Tensor& state, const Model& model, const Tensor& blob) {
    check_bytes(state, "state");
    char* base = static_cast<char*>(state.data_ptr());
    StateHead head{};
    STD_TORCH_CHECK(state.numel() >= lengths_begin, "state must be what decode_start returned");
    std::memcpy(&head, base, sizeof head);
    const bool whole = std::memcmp(head.magic, state_magic, sizeof head.magic) == 0 && head.bytes == state.numel() &&
                       head.sources >= 1 && head.sources <= (head.bytes - lengths_begin) / 4 &&
                       head.sum == state_sum(head, base);
    STD_TORCH_CHECK(whole, "state must be what decode_start returned: it was cut or damaged");
    STD_TORCH_CHECK(head.model == model_sum(blob), "state must belong to this blob; found another model's");
    return State(model, head, reinterpret_cast<const int32_t*>(base + lengths_begin), base);
}

}  // namespace decode
}  // namespace depthlstm
