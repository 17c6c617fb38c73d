// Distribution of rows over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace depthlstm {

// Smallest number of elements of one thread. Below it, waking a second thread costs more than it saves.
constexpr int64_t grain_elements = 16384;

inline int64_t row_grain(int64_t features) { return std::max<int64_t>(1, grain_elements / features); }

// Calls `body(begin, end)` for ranges of the rows 0 .. rows - 1.
template <class Body>
void parallel_rows(int64_t rows, int64_t features, const Body& body) {
    torch::stable::parallel_for(0, rows, row_grain(features), body);
}

// Chunks of rows that depend on the number of rows only, not on the threads: sums over chunks are bitwise repeatable.
struct Chunks {
    static constexpr int64_t most = 64, least_rows = 32;
    int64_t rows, chunk_rows, count;

    explicit Chunks(int64_t rows)
        : rows(rows),
          chunk_rows(std::max(least_rows, (rows + most - 1) / most)),
          count((rows + chunk_rows - 1) / chunk_rows) {}
    int64_t begin(int64_t chunk) const { return chunk * chunk_rows; }
    int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }
};

// Calls `body(begin, end)` for ranges of chunks.
template <class Body>
void parallel_chunks(const Chunks& chunks, int64_t features, const Body& body) {
    torch::stable::parallel_for(0, chunks.count, std::max<int64_t>(1, row_grain(features) / chunks.chunk_rows), body);
}

}  // namespace depthlstm
