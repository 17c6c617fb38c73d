// Weighted sums over rows of several tensors: a few of them at a time are added to sums that stay in L1.
#pragma once

#include "tile.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t gather_group = 4;  // sources at a time

// Walks over `features` by vectors, whose sums alternate between two: step(part, feature, 0 or 1).
template <int64_t W, class Step>
inline __attribute__((always_inline)) void for_pairs(int64_t features, Step step) {
    int64_t d = 0;
    for (; d + 2 * W <= features; d += 2 * W) {
        step(Whole{}, d, 0);
        step(Whole{}, d + W, 1);
    }
    for (; d + W <= features; d += W) step(Whole{}, d, 0);
    if (d < features) step(Partial{features - d}, d, 1);
}

// Sums of `outputs` tiles, `tile` elements apart, of which `count` elements are used. The weight of source s in output
// v is at v * sources + s. An element of what is read next has `next_bytes`.
template <class T>
struct Gather {
    const T* weights;
    int64_t sources, outputs;
    T* sums;
    int64_t tile, count, next_bytes;
};

// Adds N sources to the sums of VG outputs from `v` on, in the sources' order. `next` is what is read next.
template <class M, int N, int VG, bool first, class T>
void gather_outputs(const M* const* x, const char* const* next, const Gather<T>& gather, int64_t v) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t tile = gather.tile;
    T* sums = gather.sums + v * tile;
    V weight[VG][N];
    for (int i = 0; i < VG; ++i)
        for (int s = 0; s < N; ++s) weight[i][s] = V(gather.weights[(v + i) * gather.sources + s]);
    for_blocks<W>(gather.count, [&](auto part, int64_t block) __attribute__((always_inline)) {
        const int64_t d = block * W;
        V value[N];
        for (int s = 0; s < N; ++s) {
            __builtin_prefetch(next[s] + d * gather.next_bytes, 0, 2);
            value[s] = part.load(x[s] + d);
        }
        for (int i = 0; i < VG; ++i) {
            T* at = sums + i * tile + d;
            V sum = first ? value[0] * weight[i][0] : xsimd::fma(value[0], weight[i][0], V::load_aligned(at));
            for (int s = 1; s < N; ++s) sum = xsimd::fma(value[s], weight[i][s], sum);
            sum.store_aligned(at);
        }
    });
}

template <class M, int N, bool first, class T>
void gather_all(const M* const* x, const char* const* next, const Gather<T>& gather) {
    int64_t v = 0;
    for (; v + 2 <= gather.outputs; v += 2) gather_outputs<M, N, 2, first>(x, next, gather, v);
    if (v < gather.outputs) gather_outputs<M, N, 1, first>(x, next, gather, v);
}

// Adds `number` sources, at most gather_group; `first` starts the sums.
template <class M, class T>
void gather_sources(int64_t number, bool first, const M* const* x, const char* const* next, const Gather<T>& gather) {
    switch (number * 2 + int64_t(first)) {
        case 2: return gather_all<M, 1, false>(x, next, gather);
        case 3: return gather_all<M, 1, true>(x, next, gather);
        case 4: return gather_all<M, 2, false>(x, next, gather);
        case 5: return gather_all<M, 2, true>(x, next, gather);
        case 6: return gather_all<M, 3, false>(x, next, gather);
        case 7: return gather_all<M, 3, true>(x, next, gather);
        case 8: return gather_all<M, 4, false>(x, next, gather);
        default: return gather_all<M, 4, true>(x, next, gather);
    }
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
