// Attention over a list of tensors, forward and backward. This file is compiled once for each instruction set.
//
// A row of every source comes from memory once and then from the caches. Forward takes two passes over it: scores, then
// the weighted sum. Backward takes up to four: scores and the sum again, <dy, x_l>, then the gradients. The next row is
// fetched during the last pass. Only the arguments are kept from forward to backward.
//
//     dp_l = <dy, x_l>      ds_l = p_l (dp_l - sum_k p_k dp_k)      with a_l = <q, x_l>, r_l = 1 / rms(x_l), s_l = a_l r_l
//     dx_l = p_l dy + ds_l r_l q - ds_l a_l r_l^3 / C x_l           dq = sum of ds_l r_l x_l over rows and sources
//
// Sources of one dtype are read where they lie. Where dtypes are mixed, a row is converted into scratch first.
#include <cmath>
#include <cstring>
#include <limits>

#include "common/cpu/gather.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

bool computes_double(const LayerAttendCall& call) { return call.dtype == DType::float64; }

constexpr int64_t kPad = 16;  // elements: a multiple of every vector

int64_t padded(int64_t n) { return round_up_to(n, kPad); }
int64_t element_size(const LayerAttendCall& call) { return computes_double(call) ? 8 : 4; }

// packed: query * key_weight, weight, bias
int64_t packed_bytes(const LayerAttendCall& call) { return 3 * padded(call.features) * element_size(call); }
// partial: their gradients
int64_t partial_bytes(const LayerAttendCall& call) { return packed_bytes(call); }
// scratch: four rows and, where dtypes are mixed, one of each source and one gradient; five numbers of each source, and
// two addresses
int64_t scratch_bytes(const LayerAttendCall& call) {
    const int64_t rows = 4 + (call.uniform ? 0 : call.sources + 1);
    return (rows * padded(call.features) + 5 * padded(call.sources)) * element_size(call) +
           2 * padded(call.sources) * int64_t(sizeof(void*));
}

template <class T>
void pack_parameter(const FeatureParameter& parameter, int64_t features, T absent, T* packed) {
    if (parameter.data != nullptr) return read_as(parameter.dtype, parameter.data, 0, features, packed);
    for (int64_t d = 0; d < features; ++d) packed[d] = absent;
    for (int64_t d = features; d % width<T> != 0; ++d) packed[d] = T(0);
}

template <class T>
void pack_as(const LayerAttendCall& call, T* packed) {
    const int64_t row = padded(call.features);
    T *query = packed, *weight = packed + row;
    pack_parameter(call.query, call.features, T(0), query);
    pack_parameter(call.key_weight, call.features, T(1), weight);
    for (int64_t d = 0; d < call.features; ++d) query[d] *= weight[d];
    pack_parameter(call.weight, call.features, T(1), weight);
    pack_parameter(call.bias, call.features, T(0), weight + row);
}

void pack(const LayerAttendCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

// The working memory of a thread.
template <class M>
struct Work {
    using T = typename ComputeType<M>::type;
    T *y, *dy, *gradient, *mixed_gradient, *staged;  // rows
    T *share, *dot, *inverse, *product, *spare;      // numbers of each source: e^s or p, a, r, dp
    const M** x;
    const char** next;
    int64_t row_elements;

    Work(const LayerAttendCall& call, void* scratch) : row_elements(padded(call.features)) {
        const int64_t L = padded(call.sources);
        T* at = static_cast<T*>(scratch);
        const auto take = [&](int64_t elements) {
            T* taken = at;
            at += elements;
            return taken;
        };
        y = take(row_elements), dy = take(row_elements), gradient = take(row_elements);
        mixed_gradient = take(row_elements);
        staged = take(call.uniform ? 0 : (call.sources + 1) * row_elements);
        share = take(L), dot = take(L), inverse = take(L), product = take(L), spare = take(L);
        x = reinterpret_cast<const M**>(at);
        next = reinterpret_cast<const char**>(x + L);
    }

    // Finds a row of each source, and the row that is read next.
    void enter(const LayerAttendCall& call, int64_t row, int64_t row_end) {
        for (int64_t l = 0; l < call.sources; ++l) {
            const Source& source = call.source[l];
            if (call.uniform) {
                x[l] = element<M>(source.data, row * source.stride);
                next[l] = reinterpret_cast<const char*>(row + 1 < row_end ? x[l] + source.stride : x[l]);
            } else {
                read_as(source.dtype, source.data, row * source.stride, call.features, staged + l * row_elements);
                x[l] = reinterpret_cast<const M*>(staged + l * row_elements);
                next[l] = reinterpret_cast<const char*>(x[l]);
            }
        }
    }
};

// <x, query> and the sum of squares.
template <class M, class T>
__attribute__((noinline)) void dot_and_square(const M* x, const T* query, int64_t features, T* dot, T* square) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V dots[2] = {V(T(0)), V(T(0))}, squares[2] = {V(T(0)), V(T(0))};
    const auto step = [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        const V v = part.load(x + d);
        dots[lane] = xsimd::fma(v, V::load_aligned(query + d), dots[lane]);
        squares[lane] = xsimd::fma(v, v, squares[lane]);
    };
    for_pairs<W>(features, step);
    *dot = xsimd::reduce_add(dots[0] + dots[1]);
    *square = xsimd::reduce_add(squares[0] + squares[1]);
}

template <class M, class T>
__attribute__((noinline)) T dot(const M* x, const T* y, int64_t features) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V sums[2] = {V(T(0)), V(T(0))};
    for_pairs<W>(features, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        sums[lane] = xsimd::fma(part.load(x + d), V::load_aligned(y + d), sums[lane]);
    });
    return xsimd::reduce_add(sums[0] + sums[1]);
}

// Scores, e^(s - max s), and y: the sum of e x_l over the sum of e, which comes last, so that equal scores give the mean
// exactly. Returns the sum of e.
template <class M, class T>
T attend(const LayerAttendCall& call, const Work<M>& work, const T* query, bool fetch) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t l = 0; l < call.sources; ++l) {
        T square;
        dot_and_square(work.x[l], query, call.features, &work.dot[l], &square);
        work.inverse[l] = T(1) / std::sqrt(square / T(call.features) + T(call.eps));
        work.share[l] = work.dot[l] * work.inverse[l];
        if (work.share[l] > largest) largest = work.share[l];
    }
    for (int64_t l = call.sources; l % W != 0; ++l) work.share[l] = largest;
    T total = 0;
    for (int64_t l = 0; l < call.sources; l += W)
        xsimd::exp(V::load_aligned(work.share + l) - V(largest)).store_aligned(work.share + l);
    for (int64_t l = 0; l < call.sources; ++l) total += work.share[l];
    for (int64_t l = 0; l < call.sources; l += gather_group) {
        const int64_t number = call.sources - l < gather_group ? call.sources - l : gather_group;
        const Gather<T> gather{work.share + l, call.sources, 1, work.y, work.row_elements, call.features};
        const char* const* next = fetch ? work.next + l : reinterpret_cast<const char* const*>(work.x + l);
        gather_sources(number, l == 0, work.x + l, next, gather);
    }
    const V sum(total);
    for (int64_t d = 0; d < call.features; d += W) (V::load_aligned(work.y + d) / sum).store_aligned(work.y + d);
    return total;
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

template <class M>
void forward_rows(const LayerAttendCall& call, const void* packed_memory, void* scratch, int64_t row_begin,
                  int64_t row_end) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    Work<M> work(call, scratch);
    const T *query = static_cast<const T*>(packed_memory), *weight = query + work.row_elements,
            *bias = weight + work.row_elements;
    for (int64_t row = row_begin; row < row_end; ++row) {
        work.enter(call, row, row_end);
        attend<M, T>(call, work, query, true);
        M* u = row_of<M>(call.u, row);
        if (call.weight.data == nullptr) {
            for_blocks<W>(call.features, [&](auto part, int64_t block) __attribute__((always_inline)) {
                put(part, u + block * W, V::load_aligned(work.y + block * W), call.stream);
            });
            continue;
        }
        const RowNorm<T> norm = statistics(call, work.y);
        const V r(norm.r), shift(-norm.left * norm.r);
        for_blocks<W>(call.features, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            const V n = xsimd::fma(V::load_aligned(work.y + d), r, shift);
            put(part, u + d, xsimd::fma(n, V::load_aligned(weight + d), V::load_aligned(bias + d)), call.stream);
        });
    }
    end_stream(call.stream);
}

// Takes N back: dy of du, and the sums of weight and bias. With c = y - left and g = weight * du,
// dy = r (g - mean(g) - c mean(g c) / square): at small C the last two cancel, and r rounds nothing inside.
template <class M, class T>
__attribute__((noinline)) void norm_backward(const LayerAttendCall& call, const Work<M>& work, const M* du,
                                             const T* weight, T* dweight, T* dbias) {
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const RowNorm<T> norm = statistics(call, work.y);
    const V r(norm.r), left(norm.left);
    V sum[2] = {V(T(0)), V(T(0))}, sum_c[2] = {V(T(0)), V(T(0))};
    for_pairs<W>(call.features, [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        const V c = V::load_aligned(work.y + d) - left, given = part.load(du + d);
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

// dx and dq of N sources: dx = p dy + k q + m x, dq += k x.
template <class M, int N>
void write_gradients(const M* const* x, const char* const* next, M* const* dx, const typename ComputeType<M>::type* dy,
                     const typename ComputeType<M>::type* query, typename ComputeType<M>::type* dq,
                     const typename ComputeType<M>::type* p, const typename ComputeType<M>::type* k,
                     const typename ComputeType<M>::type* m, int64_t features, bool stream) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    for_blocks<W>(features, [&](auto part, int64_t block) __attribute__((always_inline)) {
        const int64_t d = block * W;
        const V g = V::load_aligned(dy + d), q = V::load_aligned(query + d);
        V sum = V::load_aligned(dq + d);
        for (int s = 0; s < N; ++s) {
            __builtin_prefetch(next[s] + d * int64_t(sizeof(M)), 0, 2);
            const V v = part.load(x[s] + d);
            if (dx[s] != nullptr)
                put(part, dx[s] + d, xsimd::fma(V(p[s]), g, xsimd::fma(V(k[s]), q, V(m[s]) * v)), stream);
            sum = xsimd::fma(V(k[s]), v, sum);
        }
        sum.store_aligned(dq + d);
    });
}

template <class M>
void backward_rows(const LayerAttendCall& call, const void* packed_memory, void* scratch, void* partial_memory,
                   int64_t row_begin, int64_t row_end) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    Work<M> work(call, scratch);
    const int64_t C = call.features, row_elements = work.row_elements;
    const T *query = static_cast<const T*>(packed_memory), *weight = query + row_elements;
    T* dq = static_cast<T*>(partial_memory);
    if (dq != nullptr) std::memset(dq, 0, std::size_t(partial_bytes(call)));
    T* dweight = dq != nullptr && call.affine_gradient ? dq + row_elements : nullptr;
    T* row_dq = work.gradient;
    for (int64_t row = row_begin; row < row_end; ++row) {
        work.enter(call, row, row_end);
        const bool inner = call.source_gradients || call.query_gradient;
        const T total = attend<M, T>(call, work, query, !inner);
        const M* du = row_of<M>(call.du, row);
        if (call.weight.data != nullptr) {
            norm_backward<M, T>(call, work, du, weight, dweight, dweight == nullptr ? nullptr : dweight + row_elements);
        } else {
            read_elements(du, C, work.dy);
        }
        if (!inner) continue;
        T mean = 0;
        for (int64_t l = 0; l < call.sources; ++l) {
            work.share[l] /= total;
            work.product[l] = dot(work.x[l], work.dy, C);
            mean += work.share[l] * work.product[l];
        }
        std::memset(row_dq, 0, std::size_t(row_elements) * sizeof(T));
        for (int64_t l = 0; l < call.sources; ++l) {  // from here on k in product and m in spare
            const T ds = work.share[l] * (work.product[l] - mean), r = work.inverse[l];
            work.product[l] = ds * r;
            work.spare[l] = -ds * work.dot[l] * r * r * r / T(C);
        }
        for (int64_t l = 0; l < call.sources;) {
            M* dx[2] = {nullptr, nullptr};
            const bool pair = call.uniform && l + 1 < call.sources;
            for (int s = 0; s < (pair ? 2 : 1) && call.source_gradients; ++s) {
                dx[s] = call.uniform ? element<M>(call.source[l + s].gradient, row * C)
                                     : reinterpret_cast<M*>(work.mixed_gradient);
            }
            const T *p = work.share + l, *k = work.product + l, *m = work.spare + l;
            if (pair) {
                write_gradients<M, 2>(work.x + l, work.next + l, dx, work.dy, query, row_dq, p, k, m, C, call.stream);
            } else {
                write_gradients<M, 1>(work.x + l, work.next + l, dx, work.dy, query, row_dq, p, k, m, C,
                                      call.stream && call.uniform);
            }
            if (!call.uniform && call.source_gradients)
                write_as(call.source[l].dtype, call.source[l].gradient, row * C, C, work.mixed_gradient);
            l += pair ? 2 : 1;
        }
        if (dq != nullptr && call.query_gradient) {
            for (int64_t d = 0; d < C; d += W)
                (V::load_aligned(dq + d) + V::load_aligned(row_dq + d)).store_aligned(dq + d);
        }
    }
    end_stream(call.stream);
}

// M is the dtype of uniform sources, and float or double for mixed ones.
template <class Visitor>
void with_type(const LayerAttendCall& call, Visitor visit) {
    switch (call.dtype) {
        case DType::float32: return visit.template operator()<float>();
        case DType::float64: return visit.template operator()<double>();
        case DType::bfloat16: return visit.template operator()<BFloat16>();
        case DType::float16: return visit.template operator()<Float16>();
    }
}

void forward(const LayerAttendCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
    with_type(call, [&]<class M>() { forward_rows<M>(call, packed, scratch, row_begin, row_end); });
}

void backward(const LayerAttendCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
    with_type(call, [&]<class M>() { backward_rows<M>(call, packed, scratch, partial, row_begin, row_end); });
}

template <class T>
void reduce_as(const LayerAttendCall& call, const T* partials, int64_t count) {
    constexpr int64_t tile = 64;
    alignas(64) T sum[tile], other[tile], value[tile];
    const int64_t row = padded(call.features), stride = 3 * row;
    const auto write = [&](const FeatureParameter& to, const T* from, int64_t first, int64_t some) {
        if (to.gradient != nullptr) write_as(to.dtype, to.gradient, first, some, from);
    };
    for (int64_t first = 0; first < call.features; first += tile) {
        const int64_t some = call.features - first < tile ? call.features - first : tile;
        const auto add = [&](int64_t number) {
            for (int64_t d = 0; d < some; ++d) {
                double all = 0;
                for (int64_t p = 0; p < count; ++p) all += double(partials[p * stride + number * row + first + d]);
                sum[d] = T(all);
            }
        };
        add(0);
        read_as(call.query.dtype, call.query.data, first, some, other);
        if (call.key_weight.data != nullptr) {
            for (int64_t d = 0; d < some; ++d) value[d] = sum[d] * other[d];
            write(call.key_weight, value, first, some);
            read_as(call.key_weight.dtype, call.key_weight.data, first, some, other);
            for (int64_t d = 0; d < some; ++d) sum[d] *= other[d];
        }
        write(call.query, sum, first, some);
        add(1);
        write(call.weight, sum, first, some);
        add(2);
        write(call.bias, sum, first, some);
    }
}

void reduce(const LayerAttendCall& call, const void* partials, int64_t count) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count);
    }
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const LayerAttendKernels layer_attend_kernels{
    DEPTHLSTM_NAME(DEPTHLSTM_ISA), packed_bytes, scratch_bytes, partial_bytes, pack, forward, backward, reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
