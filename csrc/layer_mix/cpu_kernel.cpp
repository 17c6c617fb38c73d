// Weighted sums of a list of tensors, forward and backward. This file is compiled once for each instruction set.
//
// An item is a tile of features that stays in L1. Forward keeps a tile of sums for each output there, and adds four
// sources at a time to all of them, so that memory is read once whatever V is. Backward keeps the tiles of every du
// there, and reads each source and writes its gradient once.
//
// Sources of one dtype are read where they lie. Where dtypes are mixed, each tile is converted into scratch first, so
// that the loops below exist once for each dtype and not once for each mixture.
#include <cstring>

#include "common/cpu/gather.h"
#include "cpu.h"

namespace depthlstm::DEPTHLSTM_ISA {
namespace {

constexpr int64_t kGroup = 4;  // outputs of a backward step

bool computes_double(const LayerMixCall& call) { return call.dtype == DType::float64; }

// The tiles of all outputs and of four sources fit L1 of 32 KiB for V up to 8, and L2 beyond.
int64_t tile_of(const LayerMixCall& call) {
    return call.outputs <= 1 ? 1024 : call.outputs <= 8 ? 512 : call.outputs <= 24 ? 256 : 128;
}

int64_t tiles_of(const LayerMixCall& call) { return (call.features + tile_of(call) - 1) / tile_of(call); }

int64_t items(const LayerMixCall& call) { return call.rows * tiles_of(call); }

// packed: w by [v][l]
int64_t packed_bytes(const LayerMixCall& call) {
    return round_up_to(call.outputs * call.sources * (computes_double(call) ? 8 : 4), 64);
}

// scratch: a tile of each output and, where dtypes are mixed, four of sources; backward takes three of these
int64_t scratch_bytes(const LayerMixCall& call) {
    return (call.outputs + gather_group) * tile_of(call) * (computes_double(call) ? 8 : 4);
}

template <class T>
void pack_as(const LayerMixCall& call, T* packed) {
    alignas(64) T lanes[width<T>];
    for (int64_t v = 0; v < call.outputs; ++v) {
        for (int64_t l = 0; l < call.sources; ++l) {
            const int64_t index = call.output[v] * call.weight_strides[0] + l * call.weight_strides[1];
            read_as(call.weights_dtype, call.weights, index, 1, lanes);
            packed[v * call.sources + l] = lanes[0];
        }
    }
}

void pack(const LayerMixCall& call, void* packed) {
    if (computes_double(call)) {
        pack_as(call, static_cast<double*>(packed));
    } else {
        pack_as(call, static_cast<float*>(packed));
    }
}

// The place of an item.
struct Tile {
    int64_t row, first, count;
    Tile(const LayerMixCall& call, int64_t item)
        : row(item / tiles_of(call)), first(item % tiles_of(call) * tile_of(call)) {
        count = call.features - first < tile_of(call) ? call.features - first : tile_of(call);
    }
};

const char* address(const Source& source, const Tile& tile) {
    const int64_t bytes = source.dtype == DType::float64 ? 8 : source.dtype == DType::float32 ? 4 : 2;
    return static_cast<const char*>(source.data) + (tile.row * source.stride + tile.first) * bytes;
}

template <class M>
void forward_items(const LayerMixCall& call, const void* packed, void* scratch, int64_t begin, int64_t end) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    const T* w = static_cast<const T*>(packed);
    const int64_t size = tile_of(call);
    T* sums = static_cast<T*>(scratch);
    T* staged = sums + call.outputs * size;
    for (int64_t item = begin; item < end; ++item) {
        const Tile tile(call, item), after(call, item + 1 < end ? item + 1 : item);
        for (int64_t l = 0; l < call.sources; l += gather_group) {
            const int64_t number = call.sources - l < gather_group ? call.sources - l : gather_group;
            const M* x[gather_group];
            const char* next[gather_group];  // what is read next: the following sources, or the next item's first
            for (int64_t s = 0; s < number; ++s) {
                const int64_t following = l + gather_group + s;
                next[s] = following < call.sources ? address(call.source[following], tile)
                                                   : address(call.source[s < call.sources ? s : 0], after);
                if (call.uniform) {
                    x[s] = reinterpret_cast<const M*>(address(call.source[l + s], tile));
                } else {
                    const Source& source = call.source[l + s];
                    read_as(source.dtype, address(source, tile), 0, tile.count, staged + s * size);
                    x[s] = reinterpret_cast<const M*>(staged + s * size);
                }
            }
            const Gather<T> gather{w + l, call.sources, call.outputs, sums, size, tile.count, int64_t(sizeof(M))};
            gather_sources(number, l == 0, x, next, gather);
        }
        for (int64_t v = 0; v < call.outputs; ++v) {
            M* u = row_of<M>(call.u[v], tile.row) + tile.first;
            const T* sum = sums + v * size;
            for_blocks<W>(tile.count, [&](auto part, int64_t block) __attribute__((always_inline)) {
                put(part, u + block * W, V::load_aligned(sum + block * W), call.stream);
            });
        }
    }
    end_stream(call.stream);
}

// The gradients that G outputs give to one source. `dx` takes what earlier outputs gave from `so_far`, unless that is
// null, and goes there instead of to memory if `more` outputs follow.
template <class M, int G>
void add_gradients(const M* x, const char* next, M* dx, const typename ComputeType<M>::type* const* du,
                   const typename ComputeType<M>::type* w, int64_t sources, typename ComputeType<M>::type* sum,
                   bool has_earlier, bool more, bool stream, double* partial, int64_t count) {
    using T = typename ComputeType<M>::type;
    using V = Vector<T>;
    constexpr int64_t W = width<T>;
    V weight[G], product[G][2];
    for (int v = 0; v < G; ++v) {
        weight[v] = V(w[v * sources]);
        product[v][0] = product[v][1] = V(T(0));
    }
    const auto step = [&](auto part, int64_t d, int lane) __attribute__((always_inline)) {
        V g[G];
        for (int v = 0; v < G; ++v) g[v] = V::load_aligned(du[v] + d);
        if (partial != nullptr) {
            __builtin_prefetch(next + d * int64_t(sizeof(M)), 0, 3);
            const V value = part.load(x + d);
            for (int v = 0; v < G; ++v) product[v][lane] = xsimd::fma(value, g[v], product[v][lane]);
        }
        if (dx != nullptr) {
            V gradient = has_earlier ? xsimd::fma(g[0], weight[0], V::load_aligned(sum + d)) : g[0] * weight[0];
            for (int v = 1; v < G; ++v) gradient = xsimd::fma(g[v], weight[v], gradient);
            if (more) {
                gradient.store_aligned(sum + d);
            } else {
                put(part, dx + d, gradient, stream);
            }
        }
    };
    for_pairs<W>(count, step);
    if (partial != nullptr)
        for (int v = 0; v < G; ++v) partial[v] += double(xsimd::reduce_add(product[v][0] + product[v][1]));
}

template <class M>
void backward_items(const LayerMixCall& call, const void* packed, void* scratch, double* partial, int64_t begin,
                    int64_t end) {
    using T = typename ComputeType<M>::type;
    const T* w = static_cast<const T*>(packed);
    const int64_t size = tile_of(call);
    T* given = static_cast<T*>(scratch);      // du
    T* staged = given + call.outputs * size;  // x, where dtypes are mixed
    T* gradient = staged + size;              // its gradient, where dtypes are mixed
    T* sum = gradient + size;                 // the gradient that the outputs so far give
    for (int64_t item = begin; item < end; ++item) {
        const Tile tile(call, item), after(call, item + 1 < end ? item + 1 : item);
        for (int64_t v = 0; v < call.outputs; ++v)
            read_elements(row_of<M>(call.du[v], tile.row) + tile.first, tile.count, given + v * size);
        for (int64_t l = 0; l < call.sources; ++l) {
            const Source& source = call.source[l];
            const M* x = nullptr;
            const char* next = nullptr;
            if (call.weight_gradient) {
                next = l + 1 < call.sources ? address(call.source[l + 1], tile) : address(call.source[0], after);
                if (call.uniform) {
                    x = reinterpret_cast<const M*>(address(source, tile));
                } else {
                    read_as(source.dtype, address(source, tile), 0, tile.count, staged);
                    x = reinterpret_cast<const M*>(staged);
                }
            }
            const int64_t at = tile.row * call.features + tile.first;
            M* dx = nullptr;
            if (call.source_gradients)
                dx = call.uniform ? element<M>(source.gradient, at) : reinterpret_cast<M*>(gradient);
            for (int64_t v = 0; v < call.outputs; v += kGroup) {
                const int64_t number = call.outputs - v < kGroup ? call.outputs - v : kGroup;
                const T* du[kGroup];
                for (int64_t i = 0; i < number; ++i) du[i] = given + (v + i) * size;
                double* sums = call.weight_gradient ? partial + l * call.outputs + v : nullptr;
                const auto add = [&]<int G>(std::integral_constant<int, G>) {
                    add_gradients<M, G>(x, next, dx, du, w + v * call.sources + l, call.sources, sum, v > 0,
                                        v + kGroup < call.outputs, call.stream && call.uniform, sums, tile.count);
                };
                switch (number) {
                    case 1: add(std::integral_constant<int, 1>()); break;
                    case 2: add(std::integral_constant<int, 2>()); break;
                    case 3: add(std::integral_constant<int, 3>()); break;
                    default: add(std::integral_constant<int, 4>());
                }
            }
            if (dx != nullptr && !call.uniform) write_as(source.dtype, source.gradient, at, tile.count, gradient);
        }
    }
    end_stream(call.stream);
}

// M is the dtype of uniform sources, and float or double for mixed ones.
template <class Visitor>
void with_type(const LayerMixCall& call, Visitor visit) {
    switch (call.dtype) {
        case DType::float32: return visit.template operator()<float>();
        case DType::float64: return visit.template operator()<double>();
        case DType::bfloat16: return visit.template operator()<BFloat16>();
        case DType::float16: return visit.template operator()<Float16>();
    }
}

void forward(const LayerMixCall& call, const void* packed, void* scratch, int64_t begin, int64_t end) {
    with_type(call, [&]<class M>() { forward_items<M>(call, packed, scratch, begin, end); });
}

void backward(const LayerMixCall& call, const void* packed, void* scratch, double* partial, int64_t begin,
              int64_t end) {
    with_type(call, [&]<class M>() { backward_items<M>(call, packed, scratch, partial, begin, end); });
}

void reduce(const LayerMixCall& call, const double* partials, int64_t count) {
    alignas(64) double lanes[width<double>];
    const int64_t size = call.sources * call.outputs;
    for (int64_t v = 0; v < call.outputs; ++v) {
        for (int64_t l = 0; l < call.sources; ++l) {
            double sum = 0;
            for (int64_t p = 0; p < count; ++p) sum += partials[p * size + l * call.outputs + v];
            lanes[0] = sum;
            write_as(call.weights_dtype, call.dweights, call.output[v] * call.sources + l, 1, lanes);
        }
    }
}

}  // namespace

#define DEPTHLSTM_STRING(x) #x
#define DEPTHLSTM_NAME(x) DEPTHLSTM_STRING(x)
const LayerMixKernels layer_mix_kernels{
    DEPTHLSTM_NAME(DEPTHLSTM_ISA), items, packed_bytes, scratch_bytes, pack, forward, backward, reduce};

}  // namespace depthlstm::DEPTHLSTM_ISA
