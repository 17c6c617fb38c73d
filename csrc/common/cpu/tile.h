// Parts of rows between memory of any dtype and working memory of the type that is computed in.
#pragma once

#include "rows.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t round_up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A vector of an output. Past the caches, `p` must be a multiple of a vector's bytes.
template <class M, class Part, class V>
inline __attribute__((always_inline)) void put(Part part, M* p, V v, bool stream) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Memory::stream is an ordinary store here
    if constexpr (std::is_same_v<Part, Whole>) {
        if (stream) {
            if constexpr (sizeof(M) == 8) {
                _mm256_stream_pd(p, v);
            } else if constexpr (sizeof(M) == 4) {
                _mm256_stream_ps(p, v);
            } else {
                alignas(16) M kept[V::size];
                Memory<M>::store(kept, v);
                _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(kept));
            }
            return;
        }
    }
#endif
    part.store(p, v, stream);
}

// Orders stores past the caches before whatever follows.
inline void end_stream([[maybe_unused]] bool stream) {
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
}

template <class M>
const M* element(const void* data, int64_t index) {
    return static_cast<const M*>(data) + index;
}
template <class M>
M* element(void* data, int64_t index) {
    return static_cast<M*>(data) + index;
}

// `count` elements into `out`, with zeros up to a whole vector.
template <class M, class T>
__attribute__((noinline)) void read_elements(const M* from, int64_t count, T* out) {
    constexpr int64_t W = width<T>;
    if constexpr (std::is_same_v<T, typename ComputeType<M>::type>) {
        for_blocks<W>(count, [&](auto part, int64_t block) __attribute__((always_inline)) {
            part.load(from + block * W).store_aligned(out + block * W);
        });
    } else {  // float64 beside another dtype
        constexpr int64_t N = width<float>;
        alignas(64) float lanes[N];
        for (int64_t d = 0; d < count; d += N) {
            const int64_t some = count - d < N ? count - d : N;
            load_part(from + d, some).store_aligned(lanes);
            for (int64_t i = 0; i < some; ++i) out[d + i] = T(lanes[i]);
        }
        for (int64_t d = count; d % W != 0; ++d) out[d] = T(0);
    }
}

template <class M, class T>
__attribute__((noinline)) void write_elements(M* to, int64_t count, const T* from) {
    constexpr int64_t W = width<T>;
    if constexpr (std::is_same_v<T, typename ComputeType<M>::type>) {
        for_blocks<W>(count, [&](auto part, int64_t block) __attribute__((always_inline)) {
            part.store(to + block * W, Vector<T>::load_aligned(from + block * W), false);
        });
    } else {
        constexpr int64_t N = width<float>;
        alignas(64) float lanes[N];
        for (int64_t d = 0; d < count; d += N) {
            const int64_t some = count - d < N ? count - d : N;
            for (int64_t i = 0; i < some; ++i) lanes[i] = float(from[d + i]);
            store_part(to + d, Vector<float>::load_aligned(lanes), some);
        }
    }
}

template <class T>
void read_as(DType dtype, const void* data, int64_t index, int64_t count, T* out) {
    switch (dtype) {
        case DType::float32: return read_elements(element<float>(data, index), count, out);
        case DType::float64:
            if constexpr (sizeof(T) == 8) return read_elements(element<double>(data, index), count, out);
            for (int64_t i = 0; i < count; ++i) out[i] = T(element<double>(data, index)[i]);
            for (int64_t i = count; i % width<T> != 0; ++i) out[i] = T(0);
            return;
        case DType::bfloat16: return read_elements(element<BFloat16>(data, index), count, out);
        case DType::float16: return read_elements(element<Float16>(data, index), count, out);
    }
}

template <class T>
void write_as(DType dtype, void* data, int64_t index, int64_t count, const T* from) {
    switch (dtype) {
        case DType::float32: return write_elements(element<float>(data, index), count, from);
        case DType::float64:
            if constexpr (sizeof(T) == 8) return write_elements(element<double>(data, index), count, from);
            for (int64_t i = 0; i < count; ++i) element<double>(data, index)[i] = double(from[i]);
            return;
        case DType::bfloat16: return write_elements(element<BFloat16>(data, index), count, from);
        case DType::float16: return write_elements(element<Float16>(data, index), count, from);
    }
}

}  // namespace
}  // namespace depthlstm::DEPTHLSTM_ISA
