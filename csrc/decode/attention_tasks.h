// A team's attention: a chunk is some rows, or some heads of many queries.
#pragma once

#include "state.h"

namespace depthlstm {
namespace decode {

// Rows of a chunk where every row reads `positions` positions of `floats` numbers.
inline int64_t rows_of_chunk(int64_t rows, int64_t positions, int64_t floats) {
    const double ns = double(positions * floats) * 0.1;
    return std::max({int64_t(chunk_ns / ns), (rows + Team::most_chunks - 1) / Team::most_chunks, int64_t(1)});
}

// Rows of `context`, which chunks of some rows write.
struct ContextRows {
    float* out;
    int64_t rows, rows_each, floats;

    int64_t chunks() const { return (rows + rows_each - 1) / rows_each; }
    int64_t chunk_floats() const { return rows_each * floats; }
    int64_t first(int64_t chunk) const { return chunk * rows_each; }
    int64_t end(int64_t chunk) const { return std::min(rows, first(chunk) + rows_each); }
    float* begin(int64_t chunk, const Team::Worker& worker) const {
        return worker.result == nullptr ? out + first(chunk) * floats : worker.result;
    }
    void place(int64_t chunk, const float* result) const {
        std::memcpy(out + first(chunk) * floats, result, std::size_t((end(chunk) - first(chunk)) * floats) * 4);
    }
};

// Self-attention to rows of the caches.
struct CacheTask : ContextRows {
    void (*attend)(const CacheAttention&);
    CacheAttention call;  // of the first row
    int64_t query_stride, offsets_stride;
    const int64_t* positions;  // of each row
    const AttentionScratch* scratch;

    void run(int64_t chunk, const Team::Worker& worker) const {
        CacheAttention part = call;
        part.scores = scratch->of(worker);
        part.out = begin(chunk, worker);
        for (int64_t row = first(chunk); row < end(chunk); ++row, part.out += floats) {
            part.query = call.query + row * query_stride;
            part.offsets = call.offsets + row * offsets_stride;
            part.positions = __atomic_load_n(positions + row, __ATOMIC_RELAXED);
            if (!worker.is_current()) return;  // so many offsets may not have been written yet
            attend(part);
        }
    }
};

// Cross-attention to the memories of sources.
struct CrossTask : ContextRows {
    void (*attend)(const BlockAttention&);
    const Model* model;
    const Part* part;
    int64_t cross_place;
    const float* query;

    void run(int64_t chunk, const Team::Worker& worker) const {
        const int64_t P = model->width;
        BlockAttention call;
        call.width = P;
        call.scale = model->attention_scale();
        call.scores = part->scratch.of(worker);
        call.out = begin(chunk, worker);
        call.query = query + first(chunk) * floats;
        for (int64_t row = first(chunk); row < end(chunk); ++row) {
            // whichever step wrote it, the source has a memory
            const int64_t source = __atomic_load_n(part->row_sources + row, __ATOMIC_RELAXED);
            const int64_t padded = round_up(part->lengths[source], key_block);
            call.mask = part->mask + part->memory_begin[source];
            call.positions = part->lengths[source];
            call.keys = part->memory_of(*model, source, cross_place);
            call.values = call.keys + padded * floats;
            for (int64_t head = 0; head < model->heads; ++head) {
                attend(call);
                call.keys += padded * P;
                call.values += padded * P;
                call.query += P;
                call.out += P;
            }
        }
    }
};

// A head's vectors of positions [position][stride] as blocks of keys, [block][feature][key_block].
inline void transpose_keys(const float* from, int64_t stride, int64_t positions, int64_t width, float* to) {
    for (int64_t t = 0; t < positions; ++t) {
        float* at = to + t / key_block * width * key_block + t % key_block;
        for (int64_t d = 0; d < width; ++d) at[d * key_block] = from[t * stride + d];
    }
    // positions beyond the last must not be NaN: they are masked by their scores
    for (int64_t t = positions; t < round_up(positions, key_block); ++t) {
        float* at = to + t / key_block * width * key_block + t % key_block;
        for (int64_t d = 0; d < width; ++d) at[d * key_block] = 0;
    }
}

// Many queries of one sequence. A chunk is some heads of queries that share a head of keys, which becomes blocks first.
struct HeadsTask {
    void (*attend)(const BlockAttention&);
    BlockAttention call;                      // of the first head, without keys, values and scores
    const float* keys;                        // of the first head and position; values lie `to_values` behind
    int64_t to_values, stride, block_stride;  // of a position, and of key_block of them
    int64_t positions;                        // of the last query
    int64_t group, heads_each;                // heads of queries that share keys, and those of a chunk
    const AttentionScratch* scratch;

    int64_t slices() const { return (group + heads_each - 1) / heads_each; }
    int64_t chunk_floats() const { return call.queries * heads_each * call.width; }
    int64_t first_head(int64_t chunk) const { return chunk / slices() * group + chunk % slices() * heads_each; }
    int64_t heads(int64_t chunk) const { return std::min(heads_each, group - chunk % slices() * heads_each); }

    void run(int64_t chunk, const Team::Worker& worker) const {
        const int64_t P = call.width, first = first_head(chunk);
        float *scores = scratch->of(worker), *own_keys = scores + scratch->keys_at,
              *own_values = scores + scratch->values_at;
        const float* from = keys + chunk / slices() * P;
        for (int64_t t = 0; t < positions; t += key_block, from += block_stride) {
            const int64_t count = std::min(key_block, positions - t);
            transpose_keys(from, stride, count, P, own_keys + t * P);
            for (int64_t j = 0; j < count; ++j) {
                std::memcpy(own_values + (t + j) * P, from + to_values + j * stride, std::size_t(P) * 4);
            }
        }
        BlockAttention part = call;
        part.keys = own_keys;
        part.values = own_values;
        part.scores = scores;
        if (worker.result != nullptr) part.out_stride = heads_each * P;
        for (int64_t i = 0; i < heads(chunk); ++i) {
            part.query = call.query + (first + i) * P;
            part.out = worker.result == nullptr ? call.out + (first + i) * P : worker.result + i * P;
            attend(part);
        }
    }

    void place(int64_t chunk, const float* result) const {
        const int64_t floats = heads_each * call.width, first = first_head(chunk) * call.width;
        for (int64_t query = 0; query < call.queries; ++query) {
            std::memcpy(call.out + query * call.out_stride + first, result + query * floats,
                        std::size_t(heads(chunk) * call.width) * 4);
        }
    }
};

// Runs a task of all heads of keys.
inline void share_heads(Team& team, HeadsTask task, int64_t key_heads) {
    const int64_t P = task.call.width, queries = task.call.queries;
    const double ns = double(task.positions * queries * P) * double(task.group) * 0.08;
    task.heads_each = std::clamp<int64_t>(Team::result_floats / (queries * P), 1, task.group);
    if (ns * double(key_heads) < 2 * chunk_ns || key_heads * task.slices() > Team::most_chunks) {
        task.heads_each = task.group;
        return Team::run_alone(task, key_heads);
    }
    team.share(task, key_heads * task.slices());
}

}  // namespace decode
}  // namespace depthlstm
