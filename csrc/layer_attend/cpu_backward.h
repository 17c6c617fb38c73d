// The backward pass over rows.
//
//     dp_l = <dy, x_l>   ds_l = p_l (dp_l - sum_k p_k dp_k)   with a_l = <q, x_l>, r_l = 1 / rms(x_l), s_l = a_l r_l
//     dx_l = p_l dy + k_l (q - a_l r_l^2 / C x_l)      dq = sum of k_l x_l over rows and sources      k_l = ds_l r_l
#pragma once

#include "cpu_row.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

// Takes N back: du, which is in work.dy, becomes dy. Adds to the sums of weight and bias. With c = y - left and g =
// weight * du, dy = r (g - mean(g) - c mean(g c) / square): at small C the last two cancel, and r rounds nothing
// inside.
template <class T>
__attribute__((noinline)) void norm_backward(const LayerAttendCall& call, const Work<T>& work, const T* weight,
                                             T* dweight, T* dbias) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const RowNorm<T> norm = statistics(call, work.y);
    const V r(norm.r), left(norm.left);
    V sum[2] = {V(T(0)), V(T(0))}, sum_c[2] = {V(T(0)), V(T(0))};
    for_pairs<W>(call.features, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        const V c = V::load_aligned(work.y + d) - left, given = part.load(work.dy + d);
        const V g = given * V::load_aligned(weight + d);
        if (dweight != nullptr) {
            xsimd::fma(given, c * r, V::load_aligned(dweight + d)).store_aligned(dweight + d);
            (V::load_aligned(dbias + d) + given).store_aligned(dbias + d);
        }
        sum[lane] += g;
        sum_c[lane] = xsimd::fma(g, c, sum_c[lane]);
        g.store_aligned(work.dy + d);
        c.store_aligned(work.y + d);
    });
    const bool rms = call.norm == Normalisation::rms;
    const V mean(rms ? T(0) : xsimd::reduce_add(sum[0] + sum[1]) / T(call.features));
    const V slope(xsimd::reduce_add(sum_c[0] + sum_c[1]) / T(call.features) / norm.square);
    for (int64_t d = 0; d < call.features; d += W) {
        const V g = V::load_aligned(work.dy + d), c = V::load_aligned(work.y + d);
        (r * xsimd::fnma(c, slope, g - mean)).store_aligned(work.dy + d);
    }
}

// dx and dq of N sources: dx = p dy + k (q + m x), dq += k x. At small C the last two cancel, hence this order.
template <class M, class T, int N, bool has_dx>
void write_gradients(const Work<T>& work, int64_t l, M* const* dx, const T* query, int64_t features, bool stream) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V p[N], k[N], m[N];
    const T* x[N];
    const char* next[N];
    M* to[N];
    for (int s = 0; s < N; ++s) {
        p[s] = V(work.share[l + s]), k[s] = V(work.product[l + s]), m[s] = V(work.square[l + s]);
        x[s] = work.x[l + s], next[s] = work.next[l + s], to[s] = dx[s];
    }
    const T* dy = work.dy;
    T* dq = work.dq;
    for_blocks<W>(features, [&](auto part, int64_t block) __attribute__((always_inline)) {
        const int64_t d = block * W;
        const V g = V::load_aligned(dy + d), q = V::load_aligned(query + d);
        V sum = V::load_aligned(dq + d);
        for (int s = 0; s < N; ++s) {
            __builtin_prefetch(next[s] + d * int64_t(sizeof(M)), 0, 2);
            const V v = V::load_aligned(x[s] + d);
            if constexpr (has_dx) put(part, to[s] + d, xsimd::fma(k[s], xsimd::fma(m[s], v, q), p[s] * g), stream);
            sum = xsimd::fma(k[s], v, sum);
        }
        sum.store_aligned(dq + d);
    });
}

template <class T>
void write_all_gradients(const LayerAttendCall& call, const Work<T>& work, const T* query, int64_t row) {
    const int64_t C = call.features;
    for (int64_t l = 0; l < call.sources;) {
        const Source& source = call.source[l];
        const bool pair = l + 1 < call.sources && call.source[l + 1].dtype == source.dtype;
        with_dtype(source.dtype, [&]<class M>() {
            if (!call.source_gradients) {
                T* none[2] = {nullptr, nullptr};
                if (pair) return write_gradients<T, T, 2, false>(work, l, none, query, C, false);
                return write_gradients<T, T, 1, false>(work, l, none, query, C, false);
            }
            if constexpr (is_direct<M, T>) {
                M* dx[2];
                for (int s = 0; s < (pair ? 2 : 1); ++s) dx[s] = element<M>(call.source[l + s].gradient, row * C);
                const bool stream = call.stream && source.dtype == call.dtype;
                if (pair) return write_gradients<M, T, 2, true>(work, l, dx, query, C, stream);
                write_gradients<M, T, 1, true>(work, l, dx, query, C, stream);
            } else {
                for (int64_t s = l; s < l + (pair ? 2 : 1); ++s) {
                    T* out = work.out;
                    write_gradients<T, T, 1, true>(work, s, &out, query, C, false);
                    write_as(source.dtype, call.source[s].gradient, row * C, C, out);
                }
            }
        });
        l += pair ? 2 : 1;
    }
}

template <class T>
void backward_rows(const LayerAttendCall& call, const void* packed_memory, void* scratch, void* partial_memory,
                   int64_t row_begin, int64_t row_end) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const Work<T> work(call, scratch);
    const int64_t C = call.features, packed_row = padded(C);
    const T *query = static_cast<const T*>(packed_memory), *weight = query + packed_row;
    T* dq = static_cast<T*>(partial_memory);
    if (dq != nullptr) std::memset(dq, 0, std::size_t(partial_bytes(call)));
    T* dweight = dq != nullptr && call.affine_gradient ? dq + packed_row : nullptr;
    const bool inner = call.source_gradients || call.query_gradient;
    const int64_t bytes = call.dtype == DType::float64 ? 8 : call.dtype == DType::float32 ? 4 : 2;
    for (int64_t row = row_begin; row < row_end; ++row) {
        const T total = attend(call, work, query, row, row + 1 < row_end ? row + 1 : row, !inner);
        read_as(call.dtype, static_cast<const char*>(call.du.data) + row * call.du.stride * bytes, 0, C, work.dy);
        if (call.weight.data != nullptr)
            norm_backward(call, work, weight, dweight, dweight == nullptr ? nullptr : dweight + packed_row);
        if (!inner) continue;
        T mean = 0;
        for (int64_t l = 0; l < call.sources; ++l) {
            work.share[l] /= total;
            work.product[l] = dot(work.x[l], work.dy, C);
            mean += work.share[l] * work.product[l];
        }
        std::memset(work.dq, 0, std::size_t(work.row_elements) * sizeof(T));
        for (int64_t l = 0; l < call.sources; ++l) {  // from here on k in product and m in square
            work.product[l] = work.share[l] * (work.product[l] - mean) * work.inverse[l];
            work.square[l] = T(-double(work.dot[l]) / (double(work.square[l]) + call.eps * double(C)));
        }
        write_all_gradients(call, work, query, row);
        if (dq != nullptr && call.query_gradient) {
            for (int64_t d = 0; d < C; d += W)
                (V::load_aligned(dq + d) + V::load_aligned(work.dq + d)).store_aligned(dq + d);
        }
    }
    end_stream(call.stream);
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
