// Attention of one query, and the norms and activations of rows.
#pragma once

#include "cpu_product.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr float log2_e = 1.44269504088896341f;
constexpr float infinity = __builtin_inff();

inline __attribute__((always_inline)) V exp_of(V x) { return exp2_of<false>(x * V(log2_e)); }

// Turns scores into probabilities, of which only the sum is still missing; returns 1 / sum. `count` is a multiple of
// key_block. It is 0 where every score is -inf: a query that may attend to nothing gets zeros.
float soften(float* scores, int64_t count) {
    V most(-infinity);
    for (int64_t t = 0; t < count; t += W) most = xsimd::max(V::load_unaligned(scores + t), most);
    const float maximum = xsimd::reduce_max(most);
    V sum(0.0f);
    bool is_number = true;
    for (int64_t t = 0; t < count; t += W) {
        const V score = V::load_unaligned(scores + t);
        const V e = exp_of(score - V(maximum));
        is_number = is_number && xsimd::all(score == score);
        e.store_unaligned(scores + t);
        sum += e;
    }
    if (!is_number) return __builtin_nanf("");
    return maximum == -infinity ? 0.0f : 1.0f / xsimd::reduce_add(sum);
}

// out = factor * sum over t of scores[t] values(t), for `vectors` vectors from feature d on. Two chains, because a few
// vectors would wait for the latency of each addition.
template <int vectors, class Values>
inline __attribute__((always_inline)) void weigh_strip(const float* scores, int64_t positions, Values values, int64_t d,
                                                       float factor, float* out) {
    V sum[2][vectors];
    for (int u = 0; u < 2; ++u)
        for (int v = 0; v < vectors; ++v) sum[u][v] = V(0.0f);
    int64_t t = 0;
    const auto add = [&](int u, int64_t at) __attribute__((always_inline)) {
        const float* value = values(at) + d;
        const V p(scores[at]);
        for (int v = 0; v < vectors; ++v) sum[u][v] = xsimd::fma(p, V::load_unaligned(value + v * W), sum[u][v]);
    };
    for (; t + 2 <= positions; t += 2) {
        add(0, t);
        add(1, t + 1);
    }
    if (t < positions) add(0, t);
    for (int v = 0; v < vectors; ++v) ((sum[0][v] + sum[1][v]) * V(factor)).store_unaligned(out + d + v * W);
}

template <class Values>
inline __attribute__((always_inline)) void weigh(const float* scores, int64_t positions, Values values,
                                                 int64_t features, float factor, float* out) {
    if (factor == 0.0f) {
        for (int64_t d = 0; d < features; ++d) out[d] = 0.0f;
        return;
    }
    int64_t d = 0;
    for (; d + 4 * W <= features; d += 4 * W) weigh_strip<4>(scores, positions, values, d, factor, out);
    for (; d < features; d += W) weigh_strip<1>(scores, positions, values, d, factor, out);
}

void attend_blocks(const BlockAttention& call) {
    constexpr int lanes = int(key_block / W);
    const int64_t blocks = (call.positions + key_block - 1) / key_block;
    for (int64_t block = 0; block < blocks; ++block) {
        const float* key = call.keys + block * call.width * key_block;
        V sum[4][lanes];
        for (int u = 0; u < 4; ++u)
            for (int v = 0; v < lanes; ++v) sum[u][v] = V(0.0f);
        for (int64_t d = 0; d < call.width; d += 4) {  // a width is a multiple of key_block
            for (int u = 0; u < 4; ++u) {
                const V q(call.query[d + u]);
                for (int v = 0; v < lanes; ++v)
                    sum[u][v] = xsimd::fma(q, V::load_unaligned(key + (d + u) * key_block + v * W), sum[u][v]);
            }
        }
        for (int v = 0; v < lanes; ++v) {
            V score = ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])) * V(call.scale);
            const int64_t t = block * key_block + v * W;
            if (call.mask != nullptr) score += V::load_unaligned(call.mask + t);
            score.store_unaligned(call.scores + t);
        }
    }
    for (int64_t t = call.positions; t < blocks * key_block; ++t) call.scores[t] = -infinity;
    const float factor = soften(call.scores, blocks * key_block);
    const float* values = call.values;
    const int64_t features = call.width;
    weigh(call.scores, call.positions, [=](int64_t t) { return values + t * features; }, features, factor, call.out);
}

// A block of keys, and a strip of values, is read once for several queries. A query's sums have one order, whatever is
// beside it.
inline void attend_group(const BlockAttention& call, int64_t first) {
    constexpr int lanes = int(key_block / W), Q = W > 4 ? int(W / 2) : 2;
    static_assert(Q <= most_queries_at_once);
    const float* query[Q];
    int64_t positions[Q];
    for (int q = 0; q < Q; ++q) {
        const int64_t i = std::min(first + q, call.queries - 1);
        query[q] = call.query + i * call.query_stride;
        positions[q] = call.positions + i * call.later;
    }
    const int64_t most = positions[Q - 1], padded = (most + key_block - 1) / key_block * key_block;
    for (int64_t t = 0; t < padded; t += key_block) {
        const float* key = call.keys + t * call.width;
        V sum[Q][lanes];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < lanes; ++v) sum[q][v] = V(0.0f);
        for (int64_t d = 0; d < call.width; ++d) {
            V k[lanes];
            for (int v = 0; v < lanes; ++v) k[v] = V::load_unaligned(key + d * key_block + v * W);
            for (int q = 0; q < Q; ++q) {
                const V x(query[q][d]);
                for (int v = 0; v < lanes; ++v) sum[q][v] = xsimd::fma(x, k[v], sum[q][v]);
            }
        }
        for (int v = 0; v < lanes; ++v) {
            const V added = call.mask == nullptr ? V(0.0f) : V::load_unaligned(call.mask + t + v * W);
            for (int q = 0; q < Q; ++q) {
                xsimd::fma(sum[q][v], V(call.scale), added).store_unaligned(call.scores + q * padded + t + v * W);
            }
        }
    }
    float factor[Q];
    for (int q = 0; q < Q; ++q) {
        float* scores = call.scores + q * padded;
        for (int64_t t = positions[q]; t < padded; ++t) scores[t] = -infinity;
        factor[q] = soften(scores, padded);
        if (factor[q] == 0.0f) std::memset(scores, 0, std::size_t(padded) * 4);  // it may attend to nothing
    }
    for (int64_t d = 0; d < call.width; d += key_block) {
        V sum[Q][lanes];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < lanes; ++v) sum[q][v] = V(0.0f);
        for (int64_t t = 0; t < most; ++t) {
            V value[lanes];
            for (int v = 0; v < lanes; ++v) value[v] = V::load_unaligned(call.values + t * call.width + d + v * W);
            for (int q = 0; q < Q; ++q) {
                const V p(call.scores[q * padded + t]);
                for (int v = 0; v < lanes; ++v) sum[q][v] = xsimd::fma(p, value[v], sum[q][v]);
            }
        }
        for (int q = 0; q < Q && first + q < call.queries; ++q) {
            float* out = call.out + (first + q) * call.out_stride + d;
            for (int v = 0; v < lanes; ++v) (sum[q][v] * V(factor[q])).store_unaligned(out + v * W);
        }
    }
}

void attend_queries(const BlockAttention& call) {
    constexpr int64_t at_once = W > 4 ? W / 2 : 2;
    for (int64_t first = 0; first < call.queries; first += at_once) attend_group(call, first);
}

void attend_cache(const CacheAttention& call) {
    const int64_t padded = (call.positions + key_block - 1) / key_block * key_block;
    for (int64_t t = 0; t < call.positions; ++t) {
        const float* key = call.keys + call.offsets[t];
        for (int64_t head = 0; head < call.heads; ++head) {
            const float *q = call.query + head * call.width, *k = key + head / call.group * call.width;
            V sum[2] = {V(0.0f), V(0.0f)};
            int64_t d = 0;
            for (; d + 2 * W <= call.width; d += 2 * W) {
                sum[0] = xsimd::fma(V::load_unaligned(q + d), V::load_unaligned(k + d), sum[0]);
                sum[1] = xsimd::fma(V::load_unaligned(q + d + W), V::load_unaligned(k + d + W), sum[1]);
            }
            for (; d < call.width; d += W)
                sum[0] = xsimd::fma(V::load_unaligned(q + d), V::load_unaligned(k + d), sum[0]);
            call.scores[head * padded + t] = xsimd::reduce_add(sum[0] + sum[1]) * call.scale;
        }
    }
    for (int64_t head = 0; head < call.heads; ++head) {
        float* scores = call.scores + head * padded;
        for (int64_t t = call.positions; t < padded; ++t) scores[t] = -infinity;
        const float factor = soften(scores, padded);
        const float* values = call.values + head / call.group * call.width;
        const int64_t* offsets = call.offsets;
        weigh(
            scores, call.positions, [=](int64_t t) { return values + offsets[t]; }, call.width, factor,
            call.out + head * call.width);
    }
}

// The variance is taken about the mean, less what the mean's own rounding leaves.
void normalise(const NormCall& call) {
    const int64_t D = call.features;
    for (int64_t row = 0; row < call.rows; ++row) {
        const float* x = call.x + row * call.x_stride;
        float* y = call.y + row * call.y_stride;
        V sum(0.0f), square(0.0f), rest(0.0f);
        for_blocks<W>(
            D, [&](auto part, int64_t block) __attribute__((always_inline)) { sum += part.load(x + block * W); });
        const float mean = call.rms ? 0.0f : xsimd::reduce_add(sum) / float(D);
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            V centred = part.load(x + block * W) - V(mean);
            if constexpr (std::is_same_v<decltype(part), Partial>) {
                centred = xsimd::select(first_lanes<float>(part.count), centred, V(0.0f));
            }
            square = xsimd::fma(centred, centred, square);
            rest += centred;
        });
        const float left = call.rms ? 0.0f : xsimd::reduce_add(rest) / float(D);
        const float variance = xsimd::reduce_add(square) / float(D) - left * left;
        const float factor = 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + call.eps);
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const V n = (part.load(x + block * W) - V(mean + left)) * V(factor);
            const V affine = xsimd::fma(n, part.load(call.weight + block * W), part.load(call.bias + block * W));
            part.store(y + block * W, affine, false);
        });
    }
}

template <class Function>
__attribute__((noinline)) void activate_by(float* x, int64_t count) {
    for_blocks<W>(count, [&](auto part, int64_t block) __attribute__((always_inline)) {
        part.store(x + block * W, Function::template value<false>(V(part.load(x + block * W))), false);
    });
}

void activate(Activation activation, float* x, int64_t count) {
    switch (activation) {
#define DEPTHLSTM_CASE(name, functions) \
    case Activation::name: return activate_by<functions>(x, count);
        DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_CASE)
#undef DEPTHLSTM_CASE
        case Activation::given: return;
    }
    __builtin_trap();  // an unknown code: unwritten outputs must not be taken for results
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
