// Operands of the decode engine's kernels: plain pointers, no torch, no STL.
//
// A matrix W (outputs, inputs) is packed by panels of 32 outputs, [panel][input][32]: lanes of a vector are outputs,
// and an input is one number for all of them. A panel is one stream of memory, which is read once for all rows.
#pragma once

#include "common/activations.h"

namespace depthlstm {

// bfloat16 and int8: [panel][input / 2][32][2], padded with zeros. int8 has a scale for each output.
enum class WeightType : int64_t { float32, bfloat16, int8 };

constexpr int64_t panel_outputs = 32;

// A packed matrix and its bias. The bias and the scales are padded with zeros to whole panels.
struct Panels {
    int64_t outputs = 0, inputs = 0;
    WeightType type = WeightType::float32;
    void* weights = nullptr;
    float* bias = nullptr;
    float* scale = nullptr;  // int8 only
};

// Of one output.
constexpr int64_t weight_bytes(const Panels& matrix) {
    switch (matrix.type) {
        case WeightType::float32: return matrix.inputs * 4;
        case WeightType::bfloat16: return (matrix.inputs + 1) / 2 * 4;
        default: return (matrix.inputs + 1) / 2 * 2;
    }
}

// Scratch of a product with int8 weights, for each row: its numbers as int16 and what one of them stands for.
constexpr int64_t rounded_row_bytes(int64_t inputs) { return ((inputs + 1) / 2 * 4 + 63) / 64 * 64 + 64; }

// y = base + W x + b for each row. base may be null, and may be y itself.
struct ProductCall {
    Panels panels;
    const float* x = nullptr;
    int64_t x_stride = 0;
    const float* base = nullptr;
    int64_t base_stride = 0;
    float* y = nullptr;
    int64_t y_stride = 0;
    int64_t rows = 0;
    char* rounded = nullptr;  // int8 only: rounded_row_bytes(inputs) for each row, which round_rows fills
};

// LayerNorm or RMSNorm of each row.
struct NormCall {
    int64_t rows = 0, features = 0;
    bool rms = false;
    float eps = 0;
    const float* weight = nullptr;
    const float* bias = nullptr;
    const float* x = nullptr;
    int64_t x_stride = 0;
    float* y = nullptr;
    int64_t y_stride = 0;
};

// Positions of a key or value block. Vectors of heads are padded with zeros to a multiple of it.
constexpr int64_t key_block = 16;

constexpr int64_t most_queries_at_once = 8;

// Queries of one head against keys [block][feature][16] and values [position][feature].
struct BlockAttention {
    const float* query = nullptr;
    const float* keys = nullptr;
    const float* values = nullptr;
    const float* mask = nullptr;  // added to the scores, by position; or null
    int64_t positions = 0, width = 0;
    float scale = 1;
    float* scores = nullptr;  // scratch: positions, rounded up to whole blocks; of several queries most_queries_at_once
    float* out = nullptr;     // (width)
    // attend_queries alone; query i attends to `positions` + i * `later` of them
    int64_t queries = 1, query_stride = 0, out_stride = 0, later = 0;
};

// One query of all heads against keys and values whose position t lies at offsets[t]. `group` heads of the query share
// a head of keys and values.
struct CacheAttention {
    const float* query = nullptr;
    const float* keys = nullptr;
    const float* values = nullptr;
    const int64_t* offsets = nullptr;
    int64_t positions = 0, heads = 0, width = 0, group = 1;
    float scale = 1;
    float* scores = nullptr;  // scratch: heads times positions, rounded up to whole blocks
    float* out = nullptr;     // (heads, width)
};

}  // namespace depthlstm
