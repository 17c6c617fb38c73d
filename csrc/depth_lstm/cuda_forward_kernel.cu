// The gates forward: h and c from z, c' and the affine, 7D elements of memory traffic a row. This file is compiled once
// for each dtype of z.
//
// warp    A row in a warp, without a barrier: D up to 1024, in fp32 up to 512. The affine lies in shared memory, in
//         fp32, for all rows of a block.
// block   A row in a block: D up to 8192, and any smaller D for few rows, where short latency matters more than few
//         instructions. It takes a second partial product, `z_more`.
// any     Rows that are longer or not whole 16-byte vectors. A row lies in a block, with one feature of a thread at a
//         time, in three passes over the row, which the caches keep.
//
// A thread holds its part of all gates in registers, as V vectors of W features: 16 bytes of z each.
#include "cuda_gates.cuh"
#include "cuda_kernels.h"

namespace depthlstm {
namespace DEPTHLSTM_Z_NAMESPACE {
namespace {

using Z = DEPTHLSTM_Z;
constexpr int W = 16 / sizeof(Z);
constexpr int warp_threads = 128;   // four rows at a time share an affine
constexpr int block_threads = 512;  // at most, so that a thread may have 128 registers
// Where the gates take all registers, c and hidden are first fetched into L2, and loaded when the statistics are known.
template <int E, int registers>
constexpr bool late = 4 * E >= registers / 2;

// c and hidden of a row.
template <class C, int K, int V, bool is_late>
struct State {
    Raw<C, W> c[V];
    Raw<Z, W> hidden[V];

    __device__ __forceinline__ void fetch(const GatesCall& call, int64_t row, int column, int v) {
        const C* c_at = row_of<C>(call.c, row) + column;
        const Z* hidden_at = row_of<Z>(call.hidden, row) + column;
        if constexpr (is_late) {
            prefetch(c_at);
            if constexpr (K == 3) prefetch(hidden_at);
        } else {
            c[v] = load_raw<W>(c_at);
            if constexpr (K == 3) hidden[v] = load_raw<W>(hidden_at);
        }
    }
    __device__ __forceinline__ void get(const GatesCall& call, int64_t row, int column, int v, float (&c_in)[W],
                                        float (&g)[W]) const {
        convert(is_late ? load_raw<W>(row_of<C>(call.c, row) + column) : c[v], c_in);
        if constexpr (K == 3) convert(is_late ? load_raw<W>(row_of<Z>(call.hidden, row) + column) : hidden[v], g);
    }
};

// The new state of W features. a holds the gates' pre-activations, those of sigmoids times minus_log2_e, and is
// overwritten.
template <int K>
__device__ __forceinline__ void gates(float (&i)[W], float (&f)[W], float (&o)[W], float (&g)[W],
                                      const float (&c_in)[W], const Launch& launch, int64_t row, int first,
                                      float (&h)[W], float (&c)[W]) {
    if constexpr (K == 4) activate(launch.call.activation, g);
    if (launch.seed != nullptr) {
        float factors[W];
        dropout_factors(launch, *launch.seed, row, first, factors);
#pragma unroll
        for (int j = 0; j < W; ++j) g[j] *= factors[j];
    }
#pragma unroll
    for (int j = 0; j < W; ++j) {
        cell_forward(sigmoid_of_scaled<short_polynomials>(i[j]), sigmoid_of_scaled<short_polynomials>(f[j]),
                     sigmoid_of_scaled<short_polynomials>(o[j]), g[j], c_in[j], c[j], h[j]);
    }
}

// a = n w + b for four features of a gate.
__device__ __forceinline__ void affine(float* a, float4 w, float4 b) {
    a[0] = fmaf(a[0], w.x, b.x);
    a[1] = fmaf(a[1], w.y, b.y);
    a[2] = fmaf(a[2], w.z, b.z);
    a[3] = fmaf(a[3], w.w, b.w);
}

template <class C, int K, int V>
__global__ void __launch_bounds__(warp_threads, V* W <= 8               ? 4
                                                : V * W <= 16 && W == 8 ? 3
                                                                        : 2)
    forward_warp(const __grid_constant__ Launch launch) {
    constexpr int vectors = 32 * V, quarters = W / 4;
    // by halves of a vector, [gate][quarter][vector]: lanes then read 16 bytes side by side without a bank conflict
    constexpr int slots = K * quarters * vectors;
    __shared__ float4 weights[slots], biases[slots], z_biases[slots];
    const GatesCall& call = launch.call;
    const int features = int(call.features), count = features / W;
    const bool float_affine = call.affine_dtype == DType::float32;
    const Parameter<Z> weight{call.weight, float_affine}, bias{call.bias, float_affine};
    const Parameter<Z> z_bias{call.z_bias, call.z_bias_dtype == DType::float32};
    for (int i = threadIdx.x; i < 4 * slots; i += warp_threads) {
        const int k = i / (4 * quarters * vectors), vector = i / W % vectors, element = i % W;
        if (vector >= count) continue;
        const int64_t index = int64_t(k) * features + vector * W + element;
        const int at = ((k * quarters + element / 4) * vectors + vector) * 4 + element % 4;
        const float scale = k < 3 ? float(minus_log2_e) : 1.f;
        reinterpret_cast<float*>(weights)[at] = weight.at(index, 1.f) * scale;
        reinterpret_cast<float*>(biases)[at] = bias.at(index, 0.f) * scale;
        reinterpret_cast<float*>(z_biases)[at] = z_bias.at(index, 0.f);
    }
    __syncthreads();

    const int lane = threadIdx.x & 31;
    bool inside[V];
#pragma unroll
    for (int v = 0; v < V; ++v) inside[v] = v * 32 + lane < count;
    constexpr int rows_at_once = warp_threads / 32;
    for (int64_t row = int64_t(blockIdx.x) * rows_at_once + threadIdx.x / 32; row < call.rows;
         row += int64_t(gridDim.x) * rows_at_once) {
        Raw<Z, W> raw[K][V];
        State<C, K, V, late<V * W, 255>> state;
        const Z* z_row = row_of<Z>(call.z, row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * 32 + lane) * W;
#pragma unroll
            for (int k = 0; k < K; ++k) raw[k][v] = load_raw<W>(z_row + int64_t(k) * features + column);
            state.fetch(call, row, column, v);
        }
        float z[K][V * W] = {};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float values[W];
                convert(raw[k][v], values);
#pragma unroll
                for (int j = 0; j < W; ++j) z[k][v * W + j] = values[j];
                if (call.z_bias != nullptr) {
#pragma unroll
                    for (int quarter = 0; quarter < quarters; ++quarter) {
                        const float4 four = z_biases[(k * quarters + quarter) * vectors + v * 32 + lane];
                        float* at = z[k] + v * W + quarter * 4;
                        at[0] += four.x, at[1] += four.y, at[2] += four.z, at[3] += four.w;
                    }
                }
            }
        }
        float r[K];
        normalise<K, V, W>(z, inside, launch, WarpRow{}, r);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * 32 + lane) * W;
            float a[4][W];
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int j = 0; j < W; ++j) a[k][j] = z[k][v * W + j];
#pragma unroll
                for (int quarter = 0; quarter < quarters; ++quarter) {
                    const int slot = (k * quarters + quarter) * vectors + v * 32 + lane;
                    affine(a[k] + quarter * 4, weights[slot], biases[slot]);
                }
            }
            float c_in[W], h[W], c[W];
            state.get(call, row, column, v, c_in, a[3]);
            gates<K>(a[0], a[1], a[2], a[3], c_in, launch, row, column, h, c);
            store(row_of<Z>(call.h, row) + column, h);
            store(row_of<C>(call.c_out, row) + column, c);
        }
    }
}

template <class C, int K, int V>
__global__ void __launch_bounds__(block_threads) forward_block(const __grid_constant__ Launch launch) {
    __shared__ float slots[2][block_threads / 32 * 8];
    const GatesCall& call = launch.call;
    const int features = int(call.features), count = features / W;
    bool inside[V];
#pragma unroll
    for (int v = 0; v < V; ++v) inside[v] = int(v * blockDim.x + threadIdx.x) < count;
    for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        Raw<Z, W> raw[K][V];
        State<C, K, V, late<V * W, 128>> state;
        const Z* z_row = row_of<Z>(call.z, row);
        float z[K][V * W] = {};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * blockDim.x + threadIdx.x) * W;
#pragma unroll
            for (int k = 0; k < K; ++k) raw[k][v] = load_raw<W>(z_row + int64_t(k) * features + column);
            state.fetch(call, row, column, v);
            if (launch.z_more.data != nullptr) {
                const Z* more_row = row_of<Z>(launch.z_more, row);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    float values[W];
                    convert(load_raw<W>(more_row + int64_t(k) * features + column), values);
#pragma unroll
                    for (int j = 0; j < W; ++j) z[k][v * W + j] = values[j];
                }
            }
            add_z_bias<K, W, V * W, Z>(z, call, column, v * W);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float values[W];
                convert(raw[k][v], values);
#pragma unroll
                for (int j = 0; j < W; ++j) z[k][v * W + j] += values[j];
            }
        }
        float r[K];
        normalise<K, V, W>(z, inside, launch, BlockRow<block_threads / 32, 2>{slots}, r);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * blockDim.x + threadIdx.x) * W;
            float a[4][W];
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int j = 0; j < W; ++j) a[k][j] = z[k][v * W + j];
            }
            apply_affine<K, W, Z>(a, call, column,
                                  {float(minus_log2_e), float(minus_log2_e), float(minus_log2_e), 1.f});
            float c_in[W], h[W], c[W];
            state.get(call, row, column, v, c_in, a[3]);
            gates<K>(a[0], a[1], a[2], a[3], c_in, launch, row, column, h, c);
            store(row_of<Z>(call.h, row) + column, h);
            store(row_of<C>(call.c_out, row) + column, c);
        }
    }
}

constexpr int any_threads = 256;

template <class C, int K>
__global__ void __launch_bounds__(any_threads, 4) forward_any(const __grid_constant__ Launch launch) {
    __shared__ float slots[2][any_threads / 32 * 8];
    const GatesCall& call = launch.call;
    const int features = int(call.features);
    const bool float_affine = call.affine_dtype == DType::float32;
    const Parameter<Z> weight{call.weight, float_affine}, bias{call.bias, float_affine};
    const Parameter<Z> z_bias{call.z_bias, call.z_bias_dtype == DType::float32};
    const BlockRow<any_threads / 32, 2> block{slots};
    for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        const Z* z_row = row_of<Z>(call.z, row);
        const Z* more_row = launch.z_more.data != nullptr ? row_of<Z>(launch.z_more, row) : nullptr;
        const auto z_at = [&](int k, int column) {
            const int64_t index = int64_t(k) * features + column;
            const float more = more_row != nullptr ? to_float(more_row[index]) : 0.f;
            return to_float(z_row[index]) + (z_bias.at(index, 0.f) + more);
        };
        float mean[4] = {}, r[K], shift[K];
        statistics<K>(launch, z_at, block, mean, r, shift);
        for (int column = threadIdx.x; column < features; column += blockDim.x) {
            float a[4];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const int64_t index = int64_t(k) * features + column;
                a[k] = fmaf((z_at(k, column) - mean[k]) * r[k] + shift[k], weight.at(index, 1.f), bias.at(index, 0.f));
            }
            float g[1] = {a[3]};
            if constexpr (K == 3) g[0] = to_float(row_of<Z>(call.hidden, row)[column]);
            if constexpr (K == 4) activate(call.activation, g);
            if (launch.seed != nullptr) g[0] *= dropout_factor(launch, *launch.seed, row, column);
            float h, c;
            cell_forward(sigmoid<short_polynomials>(a[0]), sigmoid<short_polynomials>(a[1]),
                         sigmoid<short_polynomials>(a[2]), g[0], to_float(row_of<C>(call.c, row)[column]), c, h);
            row_of<Z>(call.h, row)[column] = from_float<Z>(h);
            row_of<C>(call.c_out, row)[column] = from_float<C>(c);
        }
    }
}

template <class C, int K>
cudaError_t forward(const Launch& launch, const GpuDevice& device) {
    const GatesCall& call = launch.call;
    const bool aligned =
        is_aligned<Z>({call.z, call.hidden, launch.z_more, {call.h.data, call.h.stride}}, call.features, W) &&
        is_aligned<C>({call.c, {call.c_out.data, call.c_out.stride}}, call.features, W) && is_aligned_affine(call);
    const int64_t vectors = call.features / W;
    if (!aligned || call.features > 8192) {
        const int threads = int(std::min<int64_t>(any_threads, round_up(call.features, 32)));
        return launch_rows<forward_any<C, K>>(launch, call.rows, device, threads, 1);
    }
    if (vectors <= 128 && call.rows > few_rows * device.multiprocessors && launch.z_more.data == nullptr) {
        constexpr int rows = warp_threads / 32;
        if (vectors <= 32) return launch_rows<forward_warp<C, K, 1>>(launch, call.rows, device, warp_threads, rows);
        if (vectors <= 64) return launch_rows<forward_warp<C, K, 2>>(launch, call.rows, device, warp_threads, rows);
        if (vectors <= 128) return launch_rows<forward_warp<C, K, 4>>(launch, call.rows, device, warp_threads, rows);
    }
    const int threads = int(std::min<int64_t>(block_threads, round_up(vectors, 32)));
    if (vectors <= block_threads) return launch_rows<forward_block<C, K, 1>>(launch, call.rows, device, threads, 1);
    if (vectors <= 2 * block_threads) return launch_rows<forward_block<C, K, 2>>(launch, call.rows, device, threads, 1);
    if constexpr (W == 4) return launch_rows<forward_block<C, K, 4>>(launch, call.rows, device, threads, 1);
    return cudaErrorInvalidValue;  // at most 8192 features get here, and the cases above cover them
}

}  // namespace
}  // namespace DEPTHLSTM_Z_NAMESPACE

cudaError_t DEPTHLSTM_Z_FUNCTION(forward)(const Launch& launch, const GpuDevice& device) {
    const bool own = launch.call.c_dtype == launch.call.z_dtype;
    if (launch.call.hidden.data != nullptr)
        return own ? DEPTHLSTM_Z_NAMESPACE::forward<DEPTHLSTM_Z, 3>(launch, device)
                   : DEPTHLSTM_Z_NAMESPACE::forward<float, 3>(launch, device);
    return own ? DEPTHLSTM_Z_NAMESPACE::forward<DEPTHLSTM_Z, 4>(launch, device)
               : DEPTHLSTM_Z_NAMESPACE::forward<float, 4>(launch, device);
}

}  // namespace depthlstm
