// norm_step, forward and backward. This file is compiled once for each instruction set.
//
// A row is read once and lies in scratch, in fp32, between its passes: statistics need the whole row before the next
// formula can start. What a placement leaves out costs a branch for each row. A missing b is a b of 1 and a missing
// bias a bias of 0, so only the norms have loops of their own.
#include "common/cpu/norm.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

bool computes_double(const NormStepCall& call) { return call.y_dtype == DType::float64; }

// Places in each block: of parameters in `packed` and of their sums in `partial`, and of rows in scratch.
struct Places {
    int affine[3] = {};  // the weight of N1, N2, N3, its bias behind it; b has place 0
    int parameters = 1;
    int branch = 0, sum = 0, out = 0, q = 0;  // y, a x + b [N3] y, x', weight * gradient
    int rows = 0;

    explicit Places(const NormStepCall& call) {
        for (int i = 0; i < 3; ++i) {
            if (call.norm[i].there()) affine[i] = parameters, parameters += 2;
        }
        q = rows++;
        out = rows++;
        if (call.norm[0].there()) sum = rows++;
        if (call.norm[2].there()) branch = rows++;
    }
};

int64_t row_bytes(const NormStepCall& call, int64_t vectors) {
    const bool wide = computes_double(call);
    const int64_t bytes = wide ? blocks_of<double>(call.features) * width<double> * 8
                               : blocks_of<float>(call.features) * width<float> * 4;
    return round_up(bytes * vectors, 64);
}

int64_t packed_bytes(const NormStepCall& call) { return row_bytes(call, Places(call).parameters); }
int64_t scratch_bytes(const NormStepCall& call) { return row_bytes(call, Places(call).rows); }
int64_t partial_bytes(const NormStepCall& call) { return row_bytes(call, Places(call).parameters); }
int64_t feature_blocks(const NormStepCall& call) {
    return computes_double(call) ? blocks_of<double>(call.features) : blocks_of<float>(call.features);
}

template <class T>
void pack_as(const NormStepCall& call, T* packed) {
    constexpr int64_t W = width<T>;
    const Places at(call);
    const int64_t stride = at.parameters * W, D = call.features;
    if (call.scale.data != nullptr && !call.one_scale) {
        pack_parameter(call.scale, D, packed, stride);
    } else {
        const T one =
            call.scale.data == nullptr ? T(call.b) : read_as<T>(call.scale.dtype, call.scale.data, 0, 1).get(0);
        for (int64_t block = 0; block < blocks_of<T>(D); ++block) {
            const Vector<T> v = xsimd::select(first_lanes<T>(D - block * W), Vector<T>(one), Vector<T>(T(0)));
            v.store_aligned(packed + block * stride);
        }
    }
    for (int i = 0; i < 3; ++i) {
        if (!call.norm[i].there()) continue;
        pack_parameter(call.norm[i].weight, D, packed + at.affine[i] * W, stride);
        pack_parameter(call.norm[i].bias, D, packed + (at.affine[i] + 1) * W, stride);
    }
}

void pack(const NormStepCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

// What both passes compute alike, from the rows x and y of memory. Every member is inlined: an object whose address is
// passed on would be read again after each store.
template <class MX, class MY>
struct Row {
    using T = typename ComputeType<MY>::type;
    using V = Vector<T>;
    static constexpr int64_t W = width<T>;

    const T* packed;
    T* scratch;
    const int64_t D, parameters, rows;
    const int64_t affine1, affine2, affine3;  // in elements, as all places here
    const int64_t branch_row, sum_row, out_row, q_row;
    const V a;
    const T eps;
    const bool rms;

    DEPTHLSTM_HD Row(const NormStepCall& call, const Places& at, const void* packed, void* scratch)
        : packed(static_cast<const T*>(packed)),
          scratch(static_cast<T*>(scratch)),
          D(call.features),
          parameters(at.parameters * W),
          rows(at.rows * W),
          affine1(at.affine[0] * W),
          affine2(at.affine[1] * W),
          affine3(at.affine[2] * W),
          branch_row(at.branch * W),
          sum_row(at.sum * W),
          out_row(at.out * W),
          q_row(at.q * W),
          a(T(call.a)),
          eps(T(call.eps)),
          rms(call.rms) {}

    DEPTHLSTM_HD V parameter(int64_t place, int64_t block) const {
        return V::load_aligned(packed + block * parameters + place);
    }
    DEPTHLSTM_HD V affine(int64_t place, int64_t block, V n) const {
        return xsimd::fma(n, parameter(place, block), parameter(place + W, block));
    }
    DEPTHLSTM_HD T* kept(int64_t place, int64_t block) const { return scratch + block * rows + place; }
    DEPTHLSTM_HD V get(int64_t place, int64_t block) const { return V::load_aligned(kept(place, block)); }

    DEPTHLSTM_HD RowNorm<T> statistics(int64_t place, V sum) const {
        return row_norm<T>(scratch + place, rows, D, sum, rms, eps);
    }
    DEPTHLSTM_HD RowNorm<T> stage_branch(const MY* y, const MY* next) const {
        return statistics(branch_row, stage<MY>(y, next, scratch + branch_row, rows, D));
    }
    // [N3] y
    template <bool has_n3, class Part>
    DEPTHLSTM_HD V branch(Part part, int64_t block, const MY* y, const RowNorm<T>& n3) const {
        if constexpr (has_n3) {
            return affine(affine3, block, n3(get(branch_row, block)));
        } else {
            return part.load(y + block * W);
        }
    }
    // a x + b [N3] y
    template <bool has_n3, class Part>
    DEPTHLSTM_HD V sum(Part part, int64_t block, const MX* x, const MY* y, const RowNorm<T>& n3) const {
        return xsimd::fma(parameter(0, block), branch<has_n3>(part, block, y, n3), a * part.load(x + block * W));
    }
};

template <class MX, class MY>
void forward_rows(const NormStepCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
    using R = Row<MX, MY>;
    using T = typename R::T;
    using V = typename R::V;
    constexpr int64_t W = R::W;
    const R own(call, Places(call), packed, scratch);
    const int64_t D = call.features;
    const bool has_n1 = call.norm[0].there(), has_n2 = call.norm[1].there(), has_n3 = call.norm[2].there();
    const bool to_memory = call.stream;

    for (int64_t row = row_begin; row < row_end; ++row) {
        // the next row is fetched during the computation of this one; otherwise the two take turns
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MX *x = row_of<MX>(call.x, row), *next_x = row_of<MX>(call.x, ahead);
        const MY *y = row_of<MY>(call.y, row), *next_y = row_of<MY>(call.y, ahead);
        MX* x_out = row_of<MX>(call.x_out, row);
        RowNorm<T> n1, n2, n3;
        V total(T(0));
        // x' is kept as it is rounded, because N2 normalises that
        const auto finish = [&](auto part, int64_t block, V v) __attribute__((always_inline)) {
            v = store_rounded(part, x_out + block * W, v, to_memory);
            v.store_aligned(own.kept(own.out_row, block));
            total += v;
        };
        const auto join = [&](auto with_n3) __attribute__((always_inline)) {
            constexpr bool n3_too = decltype(with_n3)::value;
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                prefetch(next_x + block * W);
                if constexpr (!n3_too) prefetch(next_y + block * W);
                const V v = own.template sum<n3_too>(part, block, x, y, n3);
                if (has_n1) {
                    v.store_aligned(own.kept(own.sum_row, block));
                    total += v;
                } else {
                    finish(part, block, v);
                }
            });
        };
        if (has_n3) {
            n3 = own.stage_branch(y, next_y);
            join(std::true_type());
        } else {
            join(std::false_type());
        }
        if (has_n1) {
            n1 = own.statistics(own.sum_row, total);
            total = V(T(0));
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                finish(part, block, own.affine(own.affine1, block, n1(own.get(own.sum_row, block))));
            });
        }
        if (has_n2) {
            n2 = own.statistics(own.out_row, total);
            MY* u = row_of<MY>(call.u, row);
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                store_out(part, u + block * W, own.affine(own.affine2, block, n2(own.get(own.out_row, block))),
                          to_memory);
            });
        }
    }
    finish_stores(call.stream);
}

template <class MX, class MY>
void backward_rows(const NormStepCall& call, const void* packed, void* scratch, void* partial_memory, int64_t row_begin,
                   int64_t row_end) {
    using R = Row<MX, MY>;
    using T = typename R::T;
    using V = typename R::V;
    constexpr int64_t W = R::W;
    const R own(call, Places(call), packed, scratch);
    const int64_t D = call.features;
    const bool has_n1 = call.norm[0].there(), has_n2 = call.norm[1].there(), has_n3 = call.norm[2].there();
    const bool scale_gradient = call.scale.gradient != nullptr, has_dy = call.dy.data != nullptr;
    const bool to_memory = call.stream, reads_y = has_n1 || scale_gradient;
    T* partial = static_cast<T*>(partial_memory);
    std::memset(partial, 0, std::size_t(partial_bytes(call)));
    const auto sums_of = [&](int64_t place, int64_t block)
                             __attribute__((always_inline)) { return partial + block * own.parameters + place; };

    for (int64_t row = row_begin; row < row_end; ++row) {
        const int64_t ahead = row + 1 < row_end ? row + 1 : row;
        const MX* x = has_n1 ? row_of<MX>(call.x, row) : nullptr;
        const MX* next_x = has_n1 ? row_of<MX>(call.x, ahead) : nullptr;
        const MY* y = reads_y ? row_of<MY>(call.y, row) : nullptr;
        const MX *dx_out = row_of<MX>(call.dx_out, row), *next_dx_out = row_of<MX>(call.dx_out, ahead);
        MX* dx = row_of<MX>(call.dx, row);
        MY* dy = has_dy ? row_of<MY>(call.dy, row) : nullptr;
        RowNorm<T> n1, n2, n3;
        RowGradient<T> through1, through2, through3;
        V total(T(0)), sum_q(T(0)), sum_qn(T(0));

        if (has_n3) n3 = own.stage_branch(row_of<MY>(call.y, row), row_of<MY>(call.y, ahead));
        if (has_n1) {
            const MY* next_y = row_of<MY>(call.y, ahead);
            const auto join = [&](auto with_n3) __attribute__((always_inline)) {
                constexpr bool n3_too = decltype(with_n3)::value;
                for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                    prefetch(next_x + block * W);
                    if constexpr (!n3_too) prefetch(next_y + block * W);
                    const V v = own.template sum<n3_too>(part, block, x, y, n3);
                    v.store_aligned(own.kept(own.sum_row, block));
                    total += v;
                });
            };
            if (has_n3) {
                join(std::true_type());
            } else {
                join(std::false_type());
            }
            n1 = own.statistics(own.sum_row, total);
        }
        if (has_n2) {
            if (has_n1) {
                total = V(T(0));
                for (int64_t block = 0; block * W < D; ++block) {
                    const V v = rounded<MX>(own.affine(own.affine1, block, n1(own.get(own.sum_row, block))));
                    v.store_aligned(own.kept(own.out_row, block));
                    total += v;
                }
            } else {
                total = stage<MX>(row_of<MX>(call.x_out_read, row), row_of<MX>(call.x_out_read, ahead),
                                  own.kept(own.out_row, 0), own.rows, D);
            }
            n2 = own.statistics(own.out_row, total);
            const MY *du = row_of<MY>(call.du, row), *next_du = row_of<MY>(call.du, ahead);
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                prefetch(next_du + block * W);
                prefetch(next_dx_out + block * W);
                const V n = n2(own.get(own.out_row, block)), gradient = part.load(du + block * W);
                add_affine(sums_of(own.affine2, block), gradient, n);
                const V q = gradient * own.parameter(own.affine2, block);
                q.store_aligned(own.kept(own.q_row, block));
                sum_q += q;
                sum_qn = xsimd::fma(q, n, sum_qn);
            });
            through2 = RowGradient<T>(n2, D, sum_q, sum_qn, own.rms);
            sum_q = sum_qn = V(T(0));
        }
        // the gradient of x', as an output and through N2
        const auto incoming = [&](auto part, int64_t block) __attribute__((always_inline)) {
            V gradient = part.load(dx_out + block * W);
            if (has_n2) gradient += through2(own.get(own.q_row, block), n2(own.get(own.out_row, block)));
            return gradient;
        };
        if (has_n1) {
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                const V gradient = incoming(part, block), n = n1(own.get(own.sum_row, block));
                add_affine(sums_of(own.affine1, block), gradient, n);
                const V q = gradient * own.parameter(own.affine1, block);
                q.store_aligned(own.kept(own.q_row, block));
                sum_q += q;
                sum_qn = xsimd::fma(q, n, sum_qn);
            });
            through1 = RowGradient<T>(n1, D, sum_q, sum_qn, own.rms);
            sum_q = sum_qn = V(T(0));
        }
        // the gradient of a x + b [N3] y goes to x, b and y
        const auto give = [&](auto part, int64_t block, V gradient, auto with_n3) __attribute__((always_inline)) {
            constexpr bool n3_too = decltype(with_n3)::value;
            store_out(part, dx + block * W, own.a * gradient, to_memory);
            if (scale_gradient) {
                T* at = sums_of(0, block);
                const V v = own.template branch<n3_too>(part, block, y, n3);
                xsimd::fma(gradient, v, V::load_aligned(at)).store_aligned(at);
            }
            gradient *= own.parameter(0, block);
            if constexpr (n3_too) {
                const V n = n3(own.get(own.branch_row, block));
                add_affine(sums_of(own.affine3, block), gradient, n);
                const V q = gradient * own.parameter(own.affine3, block);
                q.store_aligned(own.kept(own.q_row, block));
                sum_q += q;
                sum_qn = xsimd::fma(q, n, sum_qn);
            } else {
                if (has_dy) store_out(part, dy + block * W, gradient, to_memory);
            }
        };
        const auto spread = [&](auto with_n3) __attribute__((always_inline)) {
            if (has_n1) {
                for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                    const V n = n1(own.get(own.sum_row, block));
                    give(part, block, through1(own.get(own.q_row, block), n), with_n3);
                });
            } else {
                for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                    give(part, block, incoming(part, block), with_n3);
                });
            }
        };
        if (has_n3) {
            spread(std::true_type());
            through3 = RowGradient<T>(n3, D, sum_q, sum_qn, own.rms);
            for_blocks<W>(D, [&](auto part, int64_t block) __attribute__((always_inline)) {
                const V v = through3(own.get(own.q_row, block), n3(own.get(own.branch_row, block)));
                store_out(part, dy + block * W, v, to_memory);
            });
        } else {
            spread(std::false_type());
        }
    }
    finish_stores(call.stream);
}

template <class T>
void reduce_as(const NormStepCall& call, const T* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    constexpr int64_t W = width<T>;
    const Places at(call);
    const int64_t stride = at.parameters * W, elements = partial_bytes(call) / int64_t(sizeof(T)), D = call.features;
    if (!call.one_scale) {
        reduce_parameter(call.scale, D, partials, elements, count, stride, block_begin, block_end);
    } else if (call.scale.gradient != nullptr && block_begin == 0) {
        double sum = 0;  // of rows times features, which may nearly cancel
        for (int64_t d = 0; d < D; ++d) {
            for (int64_t p = 0; p < count; ++p) sum += double(partials[p * elements + d / W * stride + d % W]);
        }
        write_as<T>(call.scale.dtype, call.scale.gradient, 0, Vector<T>(T(sum)), 1);
    }
    for (int i = 0; i < 3; ++i) {
        const T* from = partials + at.affine[i] * W;
        reduce_parameter(call.norm[i].weight, D, from, elements, count, stride, block_begin, block_end);
        reduce_parameter(call.norm[i].bias, D, from + W, elements, count, stride, block_begin, block_end);
    }
}

void reduce(const NormStepCall& call, const void* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count, block_begin, block_end);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count, block_begin, block_end);
    }
}

// x has the type of y, or is fp32 beside a 16-bit y.
template <class MY, class Visitor>
void with_half(const NormStepCall& call, Visitor visit) {
    if (call.x_dtype == DType::float32) return visit.template operator()<float, MY>();
    visit.template operator()<MY, MY>();
}

// avx512_bf16 differs from avx512 in its stores of bfloat16. It has kernels for a y of that type and passes every other
// call on.
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
bool is_of_avx512(const NormStepCall& call) { return call.y_dtype != DType::bfloat16; }
template <class Visitor>
void with_types(const NormStepCall& call, Visitor visit) {
    with_half<BFloat16>(call, visit);
}
#else
template <class Visitor>
void with_types(const NormStepCall& call, Visitor visit) {
    switch (call.y_dtype) {
        case DType::float32: return visit.template operator()<float, float>();
        case DType::float64: return visit.template operator()<double, double>();
        case DType::bfloat16: return with_half<BFloat16>(call, visit);
        case DType::float16: return with_half<Float16>(call, visit);
    }
}
#endif

void forward(const NormStepCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::norm_step_kernels.forward(call, packed, scratch, row_begin, row_end);
#endif
    with_types(call, [&]<class MX, class MY>() { forward_rows<MX, MY>(call, packed, scratch, row_begin, row_end); });
}

void backward(const NormStepCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call))
        return avx512::norm_step_kernels.backward(call, packed, scratch, partial, row_begin, row_end);
#endif
    with_types(
        call, [&]<class MX, class MY>() { backward_rows<MX, MY>(call, packed, scratch, partial, row_begin, row_end); });
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const NormStepKernels norm_step_kernels{DEPTHLSTM_NAME(DEPTHLSTM_ISA),
                                        packed_bytes,
                                        scratch_bytes,
                                        partial_bytes,
                                        feature_blocks,
                                        pack,
                                        forward,
                                        backward,
                                        reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
