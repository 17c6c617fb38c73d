// siamese_step, forward and backward. This file is compiled once for each instruction set.
//
// A row is read once and lies in scratch, in fp32, between its passes. Both streams have one type.
#include "common/cpu/norm.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

bool computes_double(const SiameseStepCall& call) { return call.o_dtype == DType::float64; }

// Places in each block: of parameters in `packed` and of their sums in `partial`, the bias behind the weight, and of
// rows in scratch. With a gradient the last two rows hold weight * gradient of both streams in the end.
constexpr int x_affine = 0, y_affine = 2, u_affine = 4;
constexpr int x_sum = 0, y_sum = 1, joined = 2, u_q = 3, x_q = 3, y_q = 2, scratch_rows = 4;

int parameters_of(const SiameseStepCall& call) { return call.norm.there() ? 6 : 4; }

int64_t row_bytes(const SiameseStepCall& call, int64_t vectors) {
    const bool wide = computes_double(call);
    const int64_t bytes = wide ? blocks_of<double>(call.features) * width<double> * 8
                               : blocks_of<float>(call.features) * width<float> * 4;
    return round_up(bytes * vectors, 64);
}

int64_t packed_bytes(const SiameseStepCall& call) { return row_bytes(call, parameters_of(call)); }
int64_t partial_bytes(const SiameseStepCall& call) { return row_bytes(call, parameters_of(call)); }
// the rows, and backward the sums of a group of rows
int64_t scratch_bytes(const SiameseStepCall& call) { return row_bytes(call, scratch_rows) + partial_bytes(call); }
// Sums over rows are added up by groups. One long sum lost more digits than the bound of the tests allows: with 65 rows
// of one feature the gradient of bias was off by 7.5e-7, where 6.2e-7 is allowed.
constexpr int64_t group_rows = 8;
int64_t feature_blocks(const SiameseStepCall& call) {
    return computes_double(call) ? blocks_of<double>(call.features) : blocks_of<float>(call.features);
}

template <class T>
void pack_as(const SiameseStepCall& call, T* packed) {
    constexpr int64_t W = width<T>;
    const int64_t stride = parameters_of(call) * W;
    const Affine* affines[] = {&call.x_norm, &call.y_norm, &call.norm};
    for (int i = 0; 2 * i < parameters_of(call); ++i) {
        pack_parameter(affines[i]->weight, call.features, packed + 2 * i * W, stride);
        pack_parameter(affines[i]->bias, call.features, packed + (2 * i + 1) * W, stride);
    }
}

void pack(const SiameseStepCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

// What both passes compute alike, from a row of memory. Every member is inlined: an object whose address is passed on
// would be read again after each store.
template <class MS, class MO>
struct Row {
    using T = typename ComputeType<MO>::type;
    using V = Vector<T>;
    static constexpr int64_t W = width<T>;

    const T* packed;
    T* scratch;
    const int64_t parameters, D;
    const V part_of_o;
    const T eps;
    const bool rms;
    RowNorm<T> x_norm, y_norm;

    DEPTHLSTM_HD Row(const SiameseStepCall& call, const void* packed, void* scratch)
        : packed(static_cast<const T*>(packed)),
          scratch(static_cast<T*>(scratch)),
          parameters(parameters_of(call) * W),
          D(call.features),
          part_of_o(T(1 / call.c)),
          eps(T(call.eps)),
          rms(call.rms) {}

    DEPTHLSTM_HD V parameter(int place, int64_t block) const {
        return V::load_aligned(packed + block * parameters + place * W);
    }
    DEPTHLSTM_HD V affine(int place, int64_t block, V n) const {
        return xsimd::fma(n, parameter(place, block), parameter(place + 1, block));
    }
    DEPTHLSTM_HD T* kept(int place, int64_t block) const { return scratch + (block * scratch_rows + place) * W; }
    DEPTHLSTM_HD V get(int place, int64_t block) const { return V::load_aligned(kept(place, block)); }

    DEPTHLSTM_HD RowNorm<T> statistics(int place, V sum) const {
        return row_norm<T>(kept(place, 0), scratch_rows * W, D, sum, rms, eps);
    }

    // Keeps X + o / c and Y' of a row with their statistics. `give` rounds Y', because N_y normalises what is kept.
    template <class Give>
    DEPTHLSTM_HD void join(const SiameseStepCall& call, int64_t row, int64_t ahead, Give give) {
        const MS *x = row_of<MS>(call.x, row), *next_x = row_of<MS>(call.x, ahead);
        const MS *y = row_of<MS>(call.y, row), *next_y = row_of<MS>(call.y, ahead);
        const MO *o = row_of<MO>(call.o, row), *next_o = row_of<MO>(call.o, ahead);
        V x_total(T(0)), y_total(T(0));
        // the next row is fetched during the computation of this one; otherwise the two take turns
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            prefetch(next_x + d);
            prefetch(next_y + d);
            prefetch(next_o + d);
            const V branch = part.load(o + d);
            const V to_x = xsimd::fma(branch, part_of_o, V(part.load(x + d)));
            const V to_y = give(part, d, part.load(y + d) + branch);
            to_x.store_aligned(kept(x_sum, block));
            to_y.store_aligned(kept(y_sum, block));
            x_total += to_x;
            y_total += to_y;
        });
        x_norm = statistics(x_sum, x_total);
        y_norm = statistics(y_sum, y_total);
    }
    // X' before it is rounded
    DEPTHLSTM_HD V x_out(int64_t block) const { return affine(x_affine, block, x_norm(get(x_sum, block))); }
    DEPTHLSTM_HD V join_with(int64_t block, V x) const {
        return x + affine(y_affine, block, y_norm(get(y_sum, block)));
    }
};

template <class MS, class MO>
void forward_rows(const SiameseStepCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
    using R = Row<MS, MO>;
    using T = typename R::T;
    using V = typename R::V;
    constexpr int64_t W = R::W;
    R own(call, packed, scratch);
    const int64_t D = call.features;
    const bool normed = call.norm.there(), to_memory = call.stream;

    for (int64_t row = row_begin; row < row_end; ++row) {
        MS *x_out = row_of<MS>(call.x_out, row), *y_out = row_of<MS>(call.y_out, row);
        MO* u = row_of<MO>(call.u, row);
        own.join(call, row, row + 1 < row_end ? row + 1 : row,
                 [&](auto part, int64_t d, V v)
                     __attribute__((always_inline)) { return store_rounded(part, y_out + d, v, to_memory); });
        V total(T(0));
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const V x = store_rounded(part, x_out + block * W, own.x_out(block), to_memory);
            const V sum = own.join_with(block, x);
            if (normed) {
                sum.store_aligned(own.kept(joined, block));
                total += sum;
            } else {
                store_out(part, u + block * W, sum, to_memory);
            }
        });
        if (!normed) continue;
        const RowNorm<T> norm = own.statistics(joined, total);
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            store_out(part, u + block * W, own.affine(u_affine, block, norm(own.get(joined, block))), to_memory);
        });
    }
    finish_stores(to_memory);
}

template <class MS, class MO>
void backward_rows(const SiameseStepCall& call, const void* packed, void* scratch, void* partial_memory,
                   int64_t row_begin, int64_t row_end) {
    using R = Row<MS, MO>;
    using T = typename R::T;
    using V = typename R::V;
    constexpr int64_t W = R::W;
    R own(call, packed, scratch);
    const int64_t D = call.features;
    const bool normed = call.norm.there(), to_memory = call.stream;
    T* partial = static_cast<T*>(partial_memory);
    T* group = static_cast<T*>(scratch) + row_bytes(call, scratch_rows) / int64_t(sizeof(T));
    const int64_t elements = partial_bytes(call) / int64_t(sizeof(T));
    std::memset(partial, 0, std::size_t(partial_bytes(call)));
    std::memset(group, 0, std::size_t(partial_bytes(call)));
    // adds to the sums of a norm's affine, and keeps weight * gradient with its own sums
    const auto take = [&](int affine, int q_row, int64_t block, V gradient, V n, V& sum_q, V& sum_qn)
                          __attribute__((always_inline)) {
                              add_affine(group + block * own.parameters + affine * W, gradient, n);
                              const V q = gradient * own.parameter(affine, block);
                              q.store_aligned(own.kept(q_row, block));
                              sum_q += q;
                              sum_qn = xsimd::fma(q, n, sum_qn);
                          };

    for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MS *dx_out = row_of<MS>(call.dx_out, row), *next_dx_out = row_of<MS>(call.dx_out, ahead);
        const MS *dy_out = row_of<MS>(call.dy_out, row), *next_dy_out = row_of<MS>(call.dy_out, ahead);
        const MO *du = row_of<MO>(call.du, row), *next_du = row_of<MO>(call.du, ahead);
        MS *dx = row_of<MS>(call.dx, row), *dy = row_of<MS>(call.dy, row);
        MO* d_o = row_of<MO>(call.d_o, row);
        own.join(call, row, ahead, [](auto, int64_t, V v) __attribute__((always_inline)) { return rounded<MS>(v); });
        RowNorm<T> norm;
        RowGradient<T> through_u;
        if (normed) {
            V total(T(0)), sum_q(T(0)), sum_qn(T(0));
            for (int64_t block = 0; block * W < D; ++block) {
                const V sum = own.join_with(block, rounded<MS>(own.x_out(block)));
                sum.store_aligned(own.kept(joined, block));
                total += sum;
            }
            norm = own.statistics(joined, total);
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                prefetch(next_du + block * W);
                take(u_affine, u_q, block, part.load(du + block * W), norm(own.get(joined, block)), sum_q, sum_qn);
            });
            through_u = RowGradient<T>(norm, D, sum_q, sum_qn, own.rms);
        }
        V x_sum_q(T(0)), x_sum_qn(T(0)), y_sum_q(T(0)), y_sum_qn(T(0));
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            prefetch(next_dx_out + d);
            prefetch(next_dy_out + d);
            V to_both;
            if (normed) {
                to_both = through_u(own.get(u_q, block), norm(own.get(joined, block)));
            } else {
                to_both = part.load(du + d);
            }
            take(x_affine, x_q, block, part.load(dx_out + d) + to_both, own.x_norm(own.get(x_sum, block)), x_sum_q,
                 x_sum_qn);
            take(y_affine, y_q, block, to_both, own.y_norm(own.get(y_sum, block)), y_sum_q, y_sum_qn);
        });
        const RowGradient<T> through_x(own.x_norm, D, x_sum_q, x_sum_qn, own.rms);
        const RowGradient<T> through_y(own.y_norm, D, y_sum_q, y_sum_qn, own.rms);
        for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
            const int64_t d = block * W;
            const V to_x = through_x(own.get(x_q, block), own.x_norm(own.get(x_sum, block)));
            const V to_y = part.load(dy_out + d) + through_y(own.get(y_q, block), own.y_norm(own.get(y_sum, block)));
            store_out(part, dx + d, to_x, to_memory);
            store_out(part, dy + d, to_y, to_memory);
            store_out(part, d_o + d, xsimd::fma(to_x, own.part_of_o, to_y), to_memory);
        });
        if ((row + 1 - row_begin) % group_rows == 0 || row + 1 == row_end) {
            for (int64_t i = 0; i < elements; i += W) {
                (V::load_aligned(partial + i) + V::load_aligned(group + i)).store_aligned(partial + i);
                V(T(0)).store_aligned(group + i);
            }
        }
    }
    finish_stores(to_memory);
}

template <class T>
void reduce_as(const SiameseStepCall& call, const T* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    constexpr int64_t W = width<T>;
    const int64_t stride = parameters_of(call) * W, elements = partial_bytes(call) / int64_t(sizeof(T));
    const Affine* affines[] = {&call.x_norm, &call.y_norm, &call.norm};
    for (int i = 0; 2 * i < parameters_of(call); ++i) {
        const T* from = partials + 2 * i * W;
        reduce_parameter(affines[i]->weight, call.features, from, elements, count, stride, block_begin, block_end);
        reduce_parameter(affines[i]->bias, call.features, from + W, elements, count, stride, block_begin, block_end);
    }
}

void reduce(const SiameseStepCall& call, const void* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count, block_begin, block_end);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count, block_begin, block_end);
    }
}

// The streams have the type of o, or are fp32 beside a 16-bit o.
template <class MO, class Visitor>
void with_half(const SiameseStepCall& call, Visitor visit) {
    if (call.stream_dtype == DType::float32) return visit.template operator()<float, MO>();
    visit.template operator()<MO, MO>();
}

// avx512_bf16 differs from avx512 in its stores of bfloat16. It has kernels for an o of that type and passes every
// other call on.
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
bool is_of_avx512(const SiameseStepCall& call) { return call.o_dtype != DType::bfloat16; }
template <class Visitor>
void with_types(const SiameseStepCall& call, Visitor visit) {
    with_half<BFloat16>(call, visit);
}
#else
template <class Visitor>
void with_types(const SiameseStepCall& call, Visitor visit) {
    switch (call.o_dtype) {
        case DType::float32: return visit.template operator()<float, float>();
        case DType::float64: return visit.template operator()<double, double>();
        case DType::bfloat16: return with_half<BFloat16>(call, visit);
        case DType::float16: return with_half<Float16>(call, visit);
    }
}
#endif

void forward(const SiameseStepCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::siamese_step_kernels.forward(call, packed, scratch, row_begin, row_end);
#endif
    with_types(call, [&]<class MS, class MO>() { forward_rows<MS, MO>(call, packed, scratch, row_begin, row_end); });
}

void backward(const SiameseStepCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call))
        return avx512::siamese_step_kernels.backward(call, packed, scratch, partial, row_begin, row_end);
#endif
    with_types(
        call, [&]<class MS, class MO>() { backward_rows<MS, MO>(call, packed, scratch, partial, row_begin, row_end); });
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const SiameseStepKernels siamese_step_kernels{DEPTHLSTM_NAME(DEPTHLSTM_ISA),
                                              packed_bytes,
                                              scratch_bytes,
                                              partial_bytes,
                                              feature_blocks,
                                              pack,
                                              forward,
                                              backward,
                                              reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
