// Attention over a list of tensors, forward and backward. This file is compiled once for each instruction set.
//
// A row of every source is converted into scratch, where the rows lie side by side: in memory they may lie 2^n bytes
// apart, and twelve of them would share eight ways of a cache. Forward takes two passes: scores, then the weighted sum.
// Backward takes up to four: scores and the sum again, <dy, x_l>, then the gradients. Only the arguments are kept from
// forward to backward.
//
//     dp_l = <dy, x_l>   ds_l = p_l (dp_l - sum_k p_k dp_k)   with a_l = <q, x_l>, r_l = 1 / rms(x_l), s_l = a_l r_l
//     dx_l = p_l dy + k_l (q - a_l r_l^2 / C x_l)      dq = sum of k_l x_l over rows and sources      k_l = ds_l r_l
//
// Rows of few features are computed in double. There both norms' gradients are the rest of terms that cancel.
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

template <class T>
void forward_rows(const LayerAttendCall& call, const void* packed_memory, void* scratch, int64_t row_begin,
                  int64_t row_end) {
    using V = Vector<T>;
    const Work<T> work(call, scratch);
    const int64_t C = call.features, packed_row = padded(C);
    const T *query = static_cast<const T*>(packed_memory), *weight = query + packed_row, *bias = weight + packed_row;
    for (int64_t row = row_begin; row < row_end; ++row) {
        attend(call, work, query, row, row + 1 < row_end ? row + 1 : row, true);
        if (call.weight.data == nullptr) {
            write_row(call.dtype, call.u.data, row * call.u.stride, C, call.stream, work.out,
                      [&](int64_t d) __attribute__((always_inline)) { return V::load_aligned(work.y + d); });
            continue;
        }
        const RowNorm<T> norm = statistics(call, work.y);
        const V r(norm.r), shift(-norm.left * norm.r);
        write_row(call.dtype, call.u.data, row * call.u.stride, C, call.stream, work.out,
                  [&](int64_t d) __attribute__((always_inline)) {
                      const V n = xsimd::fma(V::load_aligned(work.y + d), r, shift);
                      return xsimd::fma(n, V::load_aligned(weight + d), V::load_aligned(bias + d));
                  });
    }
    end_stream(call.stream);
}

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

void forward(const LayerAttendCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
    if (computes_double(call)) return forward_rows<double>(call, packed, scratch, row_begin, row_end);
    forward_rows<float>(call, packed, scratch, row_begin, row_end);
}

void backward(const LayerAttendCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
    if (computes_double(call)) return backward_rows<double>(call, packed, scratch, partial, row_begin, row_end);
    backward_rows<float>(call, packed, scratch, partial, row_begin, row_end);
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
