// Attention over a list of tensors, forward and backward. This file is compiled once for each instruction set.
//
// Forward takes two passes over a row: scores, then the weighted sum. Backward takes up to four: scores and the sum
// again, <dy, x_l>, then the gradients. Only the arguments are kept from forward to backward.
#include "cpu_backward.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

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
