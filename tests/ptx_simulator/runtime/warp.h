// Shuffles, votes and reductions within a warp, and its transfers of matrices of 8 x 8 elements of 16 bits.
#pragma once
#include "memory.h"

namespace ptx {

struct Shuffled {
    u32 value;
    bool in_range;
};
// `clamp` holds the segment mask in bits 8 to 12 and the bound in bits 0 to 4.
inline Shuffled shuffle(WarpOperation mode, u32 value, u32 distance, u32 clamp, u32 mask, const Location& at) {
    const int lane = current->lane, step = distance & 31, segment = clamp >> 8 & 31, first = lane & segment;
    const int bound = first | (clamp & 31 & ~segment);
    int source = first | (step & ~segment);
    if (mode == WarpOperation::shuffle_up) source = lane - step;
    if (mode == WarpOperation::shuffle_down) source = lane + step;
    if (mode == WarpOperation::shuffle_butterfly) source = lane ^ step;
    const bool in_range = mode == WarpOperation::shuffle_up ? source >= bound : source <= bound;
    if (!in_range) source = lane;
    u32 values[32];
    exchange(mask, mode, value, at, values);
    if (!(mask >> source & 1)) fail(at, "a shuffle reads lane %d, which its mask 0x%08x does not name", source, mask);
    return {values[source], in_range};
}
inline u32 ballot(bool predicate, u32 mask, const Location& at) {
    u32 values[32], result = 0;
    exchange(mask, WarpOperation::vote, predicate, at, values);
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1 && values[lane]) result |= 1u << lane;
    }
    return result;
}
template <class T, class Operation>
inline T reduce_warp(T value, u32 mask, const Location& at, Operation operation) {
    u32 values[32];
    exchange(mask, WarpOperation::reduce, u32(value), at, values);
    T result = value;
    for (u32 lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1 && lane != current->lane) result = operation(result, T(values[lane]));
    }
    return result;
}

// Lane 8 m + r names row r of matrix m. A lane holds two elements of each matrix: of row lane / 4 or, transposed, of
// that column.
template <int Count>
INLINE void matrix_rows(u64 address, WarpOperation operation, const Location& at, u32 (&rows)[32]) {
    exchange(~0u, operation, u32(address), at, rows);
    for (int i = 0; i < 8 * Count; i++) pointer<u8>(rows[i], 16, at);
}
template <bool Transposed>
INLINE u64 matrix_element(const u32 (&rows)[32], int matrix, int half) {
    const int major = current->lane / 4, minor = current->lane % 4 * 2 + half;
    return rows[8 * matrix + (Transposed ? minor : major)] + 2 * (Transposed ? major : minor);
}
template <int Count, bool Transposed>
inline Vector<u32, Count> load_matrix(u64 address, const Location& at) {
    u32 rows[32];
    matrix_rows<Count>(address, WarpOperation::load_matrix, at, rows);
    Vector<u32, Count> result;
    for (int m = 0; m < Count; m++) {
        const u32 high = load<u16>(matrix_element<Transposed>(rows, m, 1), at);
        result.element[m] = high << 16 | load<u16>(matrix_element<Transposed>(rows, m, 0), at);
    }
    return result;
}
template <int Count, bool Transposed>
inline void store_matrix(u64 address, Vector<u32, Count> value, const Location& at) {
    u32 rows[32];
    matrix_rows<Count>(address, WarpOperation::store_matrix, at, rows);
    for (int m = 0; m < Count; m++) {
        for (int half = 0; half < 2; half++) {
            store<u16>(matrix_element<Transposed>(rows, m, half), static_cast<u16>(value.element[m] >> (16 * half)),
                       at);
        }
    }
}

}  // namespace ptx
