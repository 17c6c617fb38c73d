// A row of every source in scratch: scores, the weighted sum, and its norm.
//
// A row is converted into scratch, where the rows lie side by side: in memory they may lie 2^n bytes apart, and twelve
// of them would share eight ways of a cache. Rows of few features are computed in double: there both norms' gradients
// are the rest of terms that cancel.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common/cpu/gather.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t few_features = 4;

bool computes_double(const LayerAttendCall& call) {
    return call.dtype == DType::float64 || call.features < few_features;
}

constexpr int64_t kPad = 16;  // elements: a multiple of every vector

int64_t padded(int64_t n) { return round_up_to(n, kPad); }
int64_t element_size(const LayerAttendCall& call) { return computes_double(call) ? 8 : 4; }

// packed: query * key_weight, weight, bias
int64_t packed_bytes(const LayerAttendCall& call) { return 3 * padded(call.features) * element_size(call); }
// partial: their gradients
int64_t partial_bytes(const LayerAttendCall& call) { return packed_bytes(call); }
// rows in scratch lie 2^n bytes and some apart
int64_t scratch_row(const LayerAttendCall& call) { return padded(call.features) + kPad; }
// scratch: a row of each source and four more, five numbers of each source and two addresses
int64_t scratch_bytes(const LayerAttendCall& call) {
    return ((call.sources + 4) * scratch_row(call) + 5 * padded(call.sources)) * element_size(call) +
           2 * padded(call.sources) * int64_t(sizeof(void*));
}

template <class Visitor>
void with_dtype(DType dtype, Visitor visit) {
    switch (dtype) {
        case DType::float32: return visit.template operator()<float>();
        case DType::float64: return visit.template operator()<double>();
        case DType::bfloat16: return visit.template operator()<BFloat16>();
        case DType::float16: return visit.template operator()<Float16>();
    }
}

// Whether vectors of T are read from and written to memory of type M.
template <class M, class T>
constexpr bool is_direct = std::is_same_v<typename ComputeType<M>::type, T>;

constexpr int64_t fetched = 4;  // sources of the next row that the last pass over a row fetches

// The working memory of a thread.
template <class T>
struct Work {
    T *y, *dy, *dq, *out;                         // rows
    T *share, *dot, *inverse, *product, *square;  // numbers of each source: e^s or p, a, r, dp, |x|^2
    T** x;                                        // rows of the sources
    const char** next;
    int64_t row_elements;

    Work(const LayerAttendCall& call, void* scratch) : row_elements(scratch_row(call)) {
        const int64_t L = padded(call.sources);
        T* at = static_cast<T*>(scratch);
        const auto take = [&](int64_t elements) {
            T* taken = at;
            at += elements;
            return taken;
        };
        y = take(row_elements), dy = take(row_elements), dq = take(row_elements), out = take(row_elements);
        T* rows = take(call.sources * row_elements);
        share = take(L), dot = take(L), inverse = take(L), product = take(L), square = take(L);
        x = reinterpret_cast<T**>(at);
        next = static_cast<const char**>(static_cast<void*>(x + L));
        for (int64_t l = 0; l < call.sources; ++l) x[l] = rows + l * row_elements;
    }
};

const char* address(const Source& source, int64_t row) {
    const int64_t bytes = source.dtype == DType::float64 ? 8 : source.dtype == DType::float32 ? 4 : 2;
    return static_cast<const char*>(source.data) + row * source.stride * bytes;
}

// A row into scratch, <x, query> and the sum of squares; `next` is fetched meanwhile.
template <class M, class T>
__attribute__((noinline)) void stage_row(const M* from, const char* next, const T* query, int64_t features, T* to,
                                         T* dot, T* square) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    if constexpr (is_direct<M, T>) {
        V dots[2] = {V(T(0)), V(T(0))}, squares[2] = {V(T(0)), V(T(0))};
        for_pairs<W>(features, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
            __builtin_prefetch(next + d * int64_t(sizeof(M)), 0, 3);
            const V v = part.load(from + d);
            v.store_aligned(to + d);
            dots[lane] = xsimd::fma(v, V::load_aligned(query + d), dots[lane]);
            squares[lane] = xsimd::fma(v, v, squares[lane]);
        });
        *dot = xsimd::reduce_add(dots[0] + dots[1]);
        *square = xsimd::reduce_add(squares[0] + squares[1]);
    } else {
        read_elements(from, features, to);
        stage_row<T, T>(to, next, query, features, to, dot, square);
    }
}

template <class T>
__attribute__((noinline)) T dot(const T* x, const T* y, int64_t features) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V sums[2] = {V(T(0)), V(T(0))};
    for_pairs<W>(features, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        sums[lane] = xsimd::fma(part.load(x + d), V::load_aligned(y + d), sums[lane]);
    });
    return xsimd::reduce_add(sums[0] + sums[1]);
}

// Scores, e^(s - max s), and y: the sum of e x_l over the sum of e, which comes last, so that equal scores give the
// mean exactly. Returns the sum of e.
template <class T>
T attend(const LayerAttendCall& call, const Work<T>& work, const T* query, int64_t row, int64_t after, bool fetch) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t l = 0; l < call.sources; ++l) {
        const Source& source = call.source[l];
        const char* next = address(call.source[l + 1 < call.sources ? l + 1 : l], row);
        with_dtype(source.dtype, [&]<class M>() {
            const M* from = reinterpret_cast<const M*>(address(source, row));
            stage_row<M, T>(from, next, query, call.features, work.x[l], &work.dot[l], &work.square[l]);
        });
        work.inverse[l] = T(1) / std::sqrt(work.square[l] / T(call.features) + T(call.eps));
        work.share[l] = work.dot[l] * work.inverse[l];
        if (work.share[l] > largest) largest = work.share[l];
    }
    for (int64_t l = call.sources; l % W != 0; ++l) work.share[l] = largest;
    T total = 0;
    for (int64_t l = 0; l < call.sources; l += W)
        xsimd::exp(V::load_aligned(work.share + l) - V(largest)).store_aligned(work.share + l);
    for (int64_t l = 0; l < call.sources; ++l) total += work.share[l];
    const int64_t bytes = call.dtype == DType::float32 ? 4 : call.dtype == DType::float64 ? 8 : 2;
    for (int64_t l = 0; l < call.sources; ++l)
        work.next[l] = l < fetched ? address(call.source[l], after) : reinterpret_cast<const char*>(work.x[l]);
    for (int64_t l = 0; l < call.sources; l += gather_group) {
        const int64_t number = call.sources - l < gather_group ? call.sources - l : gather_group;
        const bool fetches = fetch && l < fetched;
        const Gather<T> gather{work.share + l, call.sources,       1, work.y, work.row_elements,
                               call.features,  fetches ? bytes : 0};
        gather_sources(number, l == 0, work.x + l, work.next + l, gather);
    }
    const V sum(total);
    for (int64_t d = 0; d < call.features; d += W) (V::load_aligned(work.y + d) / sum).store_aligned(work.y + d);
    return total;
}

// A row of T out to memory of its own dtype; value(part, d) makes its vectors.
template <class T, class Value>
inline __attribute__((always_inline)) void write_row(DType dtype, void* data, int64_t index, int64_t features,
                                                     bool stream, T* out, Value value) {
    constexpr int64_t W = width<T>;
    with_dtype(dtype, [&]<class M>() __attribute__((always_inline)) {
        if constexpr (is_direct<M, T>) {
            M* to = element<M>(data, index);
            for_blocks<W>(features, [&](auto part, int64_t block) __attribute__((always_inline)) {
                put(part, to + block * W, value(block * W), stream);
            });
        } else {
            for (int64_t d = 0; d < features; d += W) value(d).store_aligned(out + d);
            write_as(dtype, data, index, features, out);
        }
    });
}

// y is left centred but for `left`: n = (y - left) * r with r = 1 / sqrt(square), square the variance and eps.
template <class T>
struct RowNorm {
    T r, left, square;
};

// The statistics in two passes. The rounding error of the mean is most of a nearly constant row's rest, and
// 1 / sqrt(eps) would blow it up, so that the second pass takes the mean of the rest too.
template <class T>
__attribute__((noinline)) RowNorm<T> statistics(const LayerAttendCall& call, T* y) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const int64_t C = call.features;
    T mean = 0;
    const bool rms = call.norm == Normalisation::rms;
    if (!rms) {
        V sums[2] = {V(T(0)), V(T(0))};
        for_pairs<W>(
            C, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) { sums[lane] += part.load(y + d); });
        mean = xsimd::reduce_add(sums[0] + sums[1]) / T(C);
    }
    V squares[2] = {V(T(0)), V(T(0))}, rest[2] = {V(T(0)), V(T(0))};
    for_pairs<W>(C, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        V centred = part.load(y + d) - V(mean);
        if constexpr (std::is_same_v<decltype(part), Partial>)
            centred = xsimd::select(first_lanes<T>(part.count), centred, V(T(0)));
        centred.store_aligned(y + d);
        squares[lane] = xsimd::fma(centred, centred, squares[lane]);
        rest[lane] += centred;
    });
    const T left = rms ? T(0) : xsimd::reduce_add(rest[0] + rest[1]) / T(C);
    const T variance = xsimd::reduce_add(squares[0] + squares[1]) / T(C) - left * left;
    const T square = (variance < T(0) ? T(0) : variance) + T(call.eps);
    return {T(1) / std::sqrt(square), left, square};
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
