// Walks over a row by vectors: positions of rows, whole and partial vectors, prefetching.
#pragma once

#include "simd.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

template <class T>
constexpr int64_t width = int64_t(Vector<T>::size);

template <class T>
typename Vector<T>::batch_bool_type first_lanes(int64_t count) {
    alignas(64) T lane[width<T>];
    for (int64_t i = 0; i < width<T>; ++i) lane[i] = T(i);
    return Vector<T>::load_aligned(lane) < Vector<T>(T(count));
}

template <class M>
const M* row_of(const ConstRows& rows, int64_t row) {
    return static_cast<const M*>(rows.data) + row * rows.stride;
}
template <class M>
M* row_of(const Rows& rows, int64_t row) {
    return static_cast<M*>(rows.data) + row * rows.stride;
}

// One vector of a row: whole, or its last `count` lanes. Loops over whole blocks must call nothing, because a call
// would spill every accumulator. Their bodies are therefore written once over a Part and instantiated for both.
struct Whole {
    template <class M>
    inline __attribute__((always_inline)) auto load(const M* p) const {
        return Memory<M>::load(p);
    }
    template <bool narrow_nan = false, class M, class V>
    inline __attribute__((always_inline)) void store(M* p, V v, bool stream) const {
        if (stream) {
            Memory<M>::template stream<narrow_nan>(p, v);
        } else {
            Memory<M>::template store<narrow_nan>(p, v);
        }
    }
};
struct Partial {
    int64_t count;
    template <class M>
    auto load(const M* p) const {
        return load_part(p, count);
    }
    template <bool = false, class M, class V>
    void store(M* p, V v, bool) const {
        store_part(p, v, count);
    }
};

template <int64_t W, class Body>
inline __attribute__((always_inline)) void for_blocks(int64_t features, Body body) {
    int64_t block = 0;
    for (; (block + 1) * W <= features; ++block) body(Whole{}, block);
    if (block * W < features) body(Partial{features - block * W}, block);
}

// Fetches rows of 16-bit types, which are short, into L1, and others into L2.
template <class M>
inline __attribute__((always_inline)) void prefetch(const M* p) {
    __builtin_prefetch(p, 0, sizeof(M) == 2 ? 3 : 2);
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
