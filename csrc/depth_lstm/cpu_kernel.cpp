// Gates of the depth-wise LSTM, forward and backward. This file is compiled once for each instruction set. cpu_row.h
// says how rows lie in memory.
#include "cpu_backward.h"
#include "cpu_forward.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

template <class T>
Vector<T> read_as(DType dtype, const void* data, int64_t index, int64_t count) {
    if constexpr (sizeof(T) == 8) {
        return load_part(static_cast<const double*>(data) + index, count);
    } else {
        switch (dtype) {
            case DType::bfloat16: return load_part(static_cast<const BFloat16*>(data) + index, count);
            case DType::float16: return load_part(static_cast<const Float16*>(data) + index, count);
            default: return load_part(static_cast<const float*>(data) + index, count);
        }
    }
}

template <class T>
void write_as(DType dtype, void* data, int64_t index, Vector<T> v, int64_t count) {
    if constexpr (sizeof(T) == 8) {
        store_part(static_cast<double*>(data) + index, v, count);
    } else {
        switch (dtype) {
            case DType::bfloat16: return store_part(static_cast<BFloat16*>(data) + index, v, count);
            case DType::float16: return store_part(static_cast<Float16*>(data) + index, v, count);
            default: return store_part(static_cast<float*>(data) + index, v, count);
        }
    }
}

template <class T>
void pack_as(const GatesCall& call, T* packed) {
    constexpr int64_t W = width<T>;
    const int gates = gate_count(call);
    const int64_t blocks = feature_blocks(call), D = call.features;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t d = block * W, count = D - d < W ? D - d : W;
        for (int k = 0; k < gates; ++k) {
            T* at = packed + (block * 3 * gates + k) * W;
            Vector<T> gamma(T(0)), beta(T(0)), z_bias(T(0));
            if (call.weight != nullptr) {
                gamma = read_as<T>(call.affine_dtype, call.weight, k * D + d, count);
                beta = read_as<T>(call.affine_dtype, call.bias, k * D + d, count);
            } else {
                gamma = xsimd::select(first_lanes<T>(count), Vector<T>(T(1)), gamma);
            }
            if (k < 3 && call.h.data != nullptr) {  // forward: see sigmoid_of_scaled in common/activations.h
                gamma *= Vector<T>(T(minus_log2_e));
                beta *= Vector<T>(T(minus_log2_e));
            }
            if (call.z_bias != nullptr) z_bias = read_as<T>(call.z_bias_dtype, call.z_bias, k * D + d, count);
            gamma.store_aligned(at);
            beta.store_aligned(at + gates * W);
            z_bias.store_aligned(at + 2 * gates * W);
        }
    }
}

void pack(const GatesCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

template <class T>
void reduce_as(const GatesCall& call, const T* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    const int gates = gate_count(call);
    const int64_t D = call.features;
    const int64_t stride = partial_bytes(call) / int64_t(sizeof(T));
    for (int64_t block = block_begin; block < block_end; ++block) {
        for (int j = 0; j < 3 * gates; ++j) {
            void* out = j < gates ? call.dweight : j < 2 * gates ? call.dbias : call.dz_bias;
            if (out == nullptr) continue;
            Vector<T> sum(T(0));
            for (int64_t p = 0; p < count; ++p)
                sum += Vector<T>::load_aligned(partials + p * stride + (block * 3 * gates + j) * width<T>);
            const int64_t d = block * width<T>;
            const DType dtype = j < 2 * gates ? call.affine_dtype : call.z_bias_dtype;
            write_as<T>(dtype, out, (j % gates) * D + d, sum, D - d < width<T> ? D - d : width<T>);
        }
    }
}

void reduce(const GatesCall& call, const void* partials, int64_t count, int64_t block_begin, int64_t block_end) {
    if (computes_double(call)) {
        reduce_as(call, static_cast<const double*>(partials), count, block_begin, block_end);
    } else {
        reduce_as(call, static_cast<const float*>(partials), count, block_begin, block_end);
    }
}

template <class MZ, class MC, bool fast, class Visitor>
void with_activation(const GatesCall& call, Visitor visit) {
// Under the sanitizers all seven take minutes to compile. They differ in their formulas only, so one stands for all.
#if defined(DEPTHLSTM_SANITIZED)
    if (call.activation == Activation::given) return visit.template operator()<MZ, MC, Given, fast>();
    return visit.template operator()<MZ, MC, Gelu, fast>();
#else
    switch (call.activation) {
#define DEPTHLSTM_CASE(name, functions) \
    case Activation::name: return visit.template operator()<MZ, MC, functions, fast>();
        DEPTHLSTM_ACTIVATIONS(DEPTHLSTM_CASE)
#undef DEPTHLSTM_CASE
        case Activation::given: return visit.template operator()<MZ, MC, Given, fast>();
    }
    __builtin_trap();  // an unknown activation code: unwritten outputs must not be taken for results
#endif
}

// The fast formulas are for calls that round every result to 16 bits. One float32 operand asks for float32 results.
template <class M, class Visitor>
void with_half(const GatesCall& call, Visitor visit) {
    const bool wide_affine = call.weight != nullptr && call.affine_dtype == DType::float32;
    const bool wide_z_bias = call.z_bias != nullptr && call.z_bias_dtype == DType::float32;
    if (call.c_dtype == DType::float32) return with_activation<M, float, false>(call, visit);
    if (wide_affine || wide_z_bias) return with_activation<M, M, false>(call, visit);
    return with_activation<M, M, true>(call, visit);
}

// avx512_bf16 differs from avx512 in its stores of bfloat16. It has kernels for z of that type and passes every other
// call on.
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
bool is_of_avx512(const GatesCall& call) { return call.z_dtype != DType::bfloat16; }
template <class Visitor>
void with_types(const GatesCall& call, Visitor visit) {
    with_half<BFloat16>(call, visit);
}
#else
template <class Visitor>
void with_types(const GatesCall& call, Visitor visit) {
    switch (call.z_dtype) {
        case DType::float32: return with_activation<float, float, false>(call, visit);
        case DType::float64: return with_activation<double, double, false>(call, visit);
        case DType::bfloat16: return with_half<BFloat16>(call, visit);
        case DType::float16: return with_half<Float16>(call, visit);
    }
}
#endif

void forward(const GatesCall& call, const void* packed, void* scratch, int64_t row_begin, int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gates_kernels.forward(call, packed, scratch, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MC, class Act, bool fast>() {
        forward_rows<MZ, MC, Act, fast>(call, packed, scratch, row_begin, row_end);
    });
}

void backward(const GatesCall& call, const void* packed, void* scratch, void* partial, int64_t row_begin,
              int64_t row_end) {
#if defined(DEPTHLSTM_ISA_AVX512_BF16)
    if (is_of_avx512(call)) return avx512::gates_kernels.backward(call, packed, scratch, partial, row_begin, row_end);
#endif
    with_types(call, [&]<class MZ, class MC, class Act, bool fast>() {
        backward_rows<MZ, MC, Act, fast>(call, packed, scratch, partial, row_begin, row_end);
    });
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const GatesKernels gates_kernels{DEPTHLSTM_NAME(DEPTHLSTM_ISA),
                                 packed_bytes,
                                 scratch_bytes,
                                 partial_bytes,
                                 feature_blocks,
                                 pack,
                                 forward,
                                 backward,
                                 reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
