// The gates backward: dz, the gradient of c' and parameter gradients from dh, dc and the inputs of forward. This file
// is compiled once for each dtype of z.
//
// narrow  D up to 2048 in whole 16-byte vectors, 12D elements of memory traffic a row. A row lies in a block, with
//         8 features a thread. Blocks stay and loop over rows, so that the sums of the parameter gradients live in
//         registers. Each block leaves one partial sum.
// wide    All other rows, 19D elements, in two kernels. `row_statistics` takes the values that need the whole row.
//         `wide_backward` gives a thread one feature and a block 256, and loops over rows.
//
// sum_partials in launch.cu adds the partial sums in a fixed order, without atomics: the same bits every time.
#include "cuda_gates.cuh"
#include "cuda_kernels.h"

namespace depthlstm {
namespace DEPTHLSTM_Z_NAMESPACE {
namespace {

using Z = DEPTHLSTM_Z;
constexpr int W = 16 / sizeof(Z);
constexpr int narrow_features = 2048, narrow_threads = 256, E = 8, V = E / W;
constexpr int any_threads = 256;

// Gradients of the pre-activations of K gates, of hidden (or of a computed g) and of c', for one feature.
template <int K>
struct Gradients {
    float da[K], dg, dc_in;
};

template <int K>
__device__ __forceinline__ Gradients<K> gradients(float a_i, float a_f, float a_o, float g, float slope, float factor,
                                                  float c_in, float dh, float dc) {
    const CellGradient<float> cell = cell_backward(sigmoid<short_polynomials>(a_i), sigmoid<short_polynomials>(a_f),
                                                   sigmoid<short_polynomials>(a_o), g * factor, c_in, dh, dc);
    Gradients<K> result;
    result.da[0] = cell.da_i, result.da[1] = cell.da_f, result.da[2] = cell.da_o;
    result.dg = cell.dg * factor;
    if constexpr (K == 4) result.da[3] = result.dg * slope;
    result.dc_in = cell.dc_in;
    return result;
}

template <class C, int K, bool z_bias_gradient>
__global__ void __launch_bounds__(narrow_threads) narrow_backward(const __grid_constant__ Launch launch) {
    __shared__ float slots[3][narrow_threads / 32 * 8];
    const GatesCall& call = launch.call;
    const int features = int(call.features), count = features / W;
    const BlockRow<narrow_threads / 32, 3> block{slots};
    bool inside[V];
#pragma unroll
    for (int v = 0; v < V; ++v) inside[v] = int(v * blockDim.x + threadIdx.x) < count;
    float dweight[K][E] = {}, dbias[K][E] = {}, dz_bias[K][E] = {};

    for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        Raw<Z, W> raw[K][V], raw_dh[V] = {}, raw_hidden[V];
        Raw<C, W> raw_c[V], raw_dc[V] = {};
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * blockDim.x + threadIdx.x) * W;
#pragma unroll
            for (int k = 0; k < K; ++k)
                raw[k][v] = load_raw<W>(row_of<Z>(call.z, row) + int64_t(k) * features + column);
            raw_c[v] = load_raw<W>(row_of<C>(call.c, row) + column);
            if (call.dh.data != nullptr) raw_dh[v] = load_raw<W>(row_of<Z>(call.dh, row) + column);
            if (call.dc.data != nullptr) raw_dc[v] = load_raw<W>(row_of<C>(call.dc, row) + column);
            if constexpr (K == 3) raw_hidden[v] = load_raw<W>(row_of<Z>(call.hidden, row) + column);
        }
        float n[K][E] = {}, r[K];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float values[W];
                convert(raw[k][v], values);
#pragma unroll
                for (int j = 0; j < W; ++j) n[k][v * W + j] = values[j];
            }
            add_z_bias<K, W, E, Z>(n, call, (v * blockDim.x + threadIdx.x) * W, v * W);
        }
        normalise<K, V, W>(n, inside, launch, block, r);

        float u[K][E] = {};  // weight * da, and finally dz
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
            const int column = (v * blockDim.x + threadIdx.x) * W;
            float a[4][W], slope[W] = {}, factor[W], c_in[W], dh[W], dc[W], dhidden[W], dc_in[W];
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int j = 0; j < W; ++j) a[k][j] = n[k][v * W + j];
            }
            apply_affine<K, W, Z>(a, call, column, {1.f, 1.f, 1.f, 1.f});
            if constexpr (K == 4) {
                activate(call.activation, a[3], slope);
            } else {
                convert(raw_hidden[v], a[3]);
            }
#pragma unroll
            for (int j = 0; j < W; ++j) factor[j] = 1.f;
            if (launch.seed != nullptr) dropout_factors(launch, *launch.seed, row, column, factor);
            convert(raw_c[v], c_in);
            convert(raw_dh[v], dh);
            convert(raw_dc[v], dc);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const int e = v * W + j;
                const Gradients<K> found =
                    gradients<K>(a[0][j], a[1][j], a[2][j], a[3][j], slope[j], factor[j], c_in[j], dh[j], dc[j]);
                dhidden[j] = found.dg;
                dc_in[j] = found.dc_in;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    dweight[k][e] += found.da[k] * n[k][e];
                    dbias[k][e] += found.da[k];
                    u[k][e] = found.da[k];
                }
            }
            store(row_of<C>(call.dc_in, row) + column, dc_in);
            if constexpr (K == 3) store(row_of<Z>(call.dhidden, row) + column, dhidden);
            multiply_by_weight<K, W, E, Z>(u, call, column, v * W);
        }
        if (call.norm != Norm::none) {
            float means[8] = {};
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    means[k] += u[k][e];
                    means[4 + k] += u[k][e] * n[k][e];
                }
            }
            row_means<K>(means, 2, call, block);
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int e = 0; e < E; ++e) u[k][e] = r[k] * (u[k][e] - means[k] - n[k][e] * means[4 + k]);
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float values[W];
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    values[j] = u[k][v * W + j];
                    if constexpr (z_bias_gradient) dz_bias[k][v * W + j] += values[j];
                }
                store(row_of<Z>(call.dz, row) + int64_t(k) * features + int64_t(v * blockDim.x + threadIdx.x) * W,
                      values);
            }
        }
    }

    const bool affine_gradient = call.dweight != nullptr;
    const int64_t width = int64_t(K) * features;
    float* partial = launch.partial + blockIdx.x * ((affine_gradient ? 2 : 0) + z_bias_gradient) * width;
    const auto store_sums = [&](const float (&sums)[K][E]) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (!inside[v]) continue;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                float values[W];
#pragma unroll
                for (int j = 0; j < W; ++j) values[j] = sums[k][v * W + j];
                store(partial + int64_t(k) * features + int64_t(v * blockDim.x + threadIdx.x) * W, values);
            }
        }
        partial += width;
    };
    if (affine_gradient) {
        store_sums(dweight);
        store_sums(dbias);
    }
    if constexpr (z_bias_gradient) store_sums(dz_bias);
}

// The inputs of one feature of a row, element by element.
template <class C, int K>
struct Feature {
    const Launch& launch;
    Parameter<Z> weight, bias, z_bias;

    __device__ __forceinline__ explicit Feature(const Launch& launch)
        : launch(launch),
          weight{launch.call.weight, launch.call.affine_dtype == DType::float32},
          bias{launch.call.bias, launch.call.affine_dtype == DType::float32},
          z_bias{launch.call.z_bias, launch.call.z_bias_dtype == DType::float32} {}

    __device__ __forceinline__ float z(int64_t row, int k, int column) const {
        const int64_t index = k * launch.call.features + column;
        return to_float(row_of<Z>(launch.call.z, row)[index]) + z_bias.at(index, 0.f);
    }

    // gradients from n and the affine (w, b) of the K gates
    __device__ __forceinline__ Gradients<K> at(int64_t row, int column, const float (&n)[K], const float (&w)[K],
                                               const float (&b)[K]) const {
        const GatesCall& call = launch.call;
        float g[1], slope[1] = {}, a[K];
#pragma unroll
        for (int k = 0; k < K; ++k) a[k] = fmaf(n[k], w[k], b[k]);
        if constexpr (K == 4) {
            g[0] = a[3];
            activate(call.activation, g, slope);
        } else {
            g[0] = to_float(row_of<Z>(call.hidden, row)[column]);
        }
        const float factor = launch.seed != nullptr ? dropout_factor(launch, *launch.seed, row, column) : 1.f;
        const float dh = call.dh.data != nullptr ? to_float(row_of<Z>(call.dh, row)[column]) : 0.f;
        const float dc = call.dc.data != nullptr ? to_float(row_of<C>(call.dc, row)[column]) : 0.f;
        return gradients<K>(a[0], a[1], a[2], g[0], slope[0], factor, to_float(row_of<C>(call.c, row)[column]), dh, dc);
    }
};

constexpr int statistics_of_a_row = 20;  // floats: mean, r, shift, mean(u) and mean(u n) of four gates

template <class C, int K>
__global__ void __launch_bounds__(any_threads) row_statistics(const __grid_constant__ Launch launch) {
    __shared__ float slots[3][any_threads / 32 * 8];
    const GatesCall& call = launch.call;
    const int features = int(call.features);
    const Feature<C, K> feature(launch);
    const BlockRow<any_threads / 32, 3> block{slots};
    for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        float mean[4], r[K], shift[K], means[8] = {};
        statistics<K>(launch, [&](int k, int column) { return feature.z(row, k, column); }, block, mean, r, shift);
        for (int column = threadIdx.x; column < features; column += blockDim.x) {
            float n[K], w[K], b[K];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                n[k] = (feature.z(row, k, column) - mean[k]) * r[k] + shift[k];
                w[k] = feature.weight.at(int64_t(k) * features + column, 1.f);
                b[k] = feature.bias.at(int64_t(k) * features + column, 0.f);
            }
            const Gradients<K> found = feature.at(row, column, n, w, b);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float u = w[k] * found.da[k];
                means[k] += u;
                means[4 + k] += u * n[k];
            }
        }
        row_means<K>(means, 2, call, block);
        if (threadIdx.x == 0) {
            float* at = launch.statistics + row * statistics_of_a_row;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                at[k] = mean[k], at[4 + k] = r[k], at[8 + k] = shift[k], at[12 + k] = means[k],
                at[16 + k] = means[4 + k];
            }
        }
    }
}

template <class C, int K>
__global__ void __launch_bounds__(any_threads) wide_backward(const __grid_constant__ Launch launch) {
    const GatesCall& call = launch.call;
    const int features = int(call.features);
    const Feature<C, K> feature(launch);
    const int column = blockIdx.x * any_threads + threadIdx.x;
    if (column >= features) return;  // no barrier follows
    float w[K], b[K], dweight[K] = {}, dbias[K] = {}, dz_bias[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
        w[k] = feature.weight.at(int64_t(k) * features + column, 1.f);
        b[k] = feature.bias.at(int64_t(k) * features + column, 0.f);
    }
    for (int64_t row = blockIdx.y; row < call.rows; row += gridDim.y) {
        const float* at = launch.statistics + row * statistics_of_a_row;
        const bool normed = call.norm != Norm::none;
        float n[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float z = feature.z(row, k, column);
            n[k] = normed ? (z - at[k]) * at[4 + k] + at[8 + k] : z;
        }
        const Gradients<K> found = feature.at(row, column, n, w, b);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float u = w[k] * found.da[k];
            const float dz = normed ? at[4 + k] * (u - at[12 + k] - n[k] * at[16 + k]) : u;
            dweight[k] += found.da[k] * n[k];
            dbias[k] += found.da[k];
            dz_bias[k] += dz;
            row_of<Z>(call.dz, row)[int64_t(k) * features + column] = from_float<Z>(dz);
        }
        row_of<C>(call.dc_in, row)[column] = from_float<C>(found.dc_in);
        if constexpr (K == 3) row_of<Z>(call.dhidden, row)[column] = from_float<Z>(found.dg);
    }
    const bool affine_gradient = call.dweight != nullptr, z_bias_gradient = call.dz_bias != nullptr;
    const int64_t width = int64_t(K) * features;
    float* partial =
        launch.partial + blockIdx.y * ((affine_gradient ? 2 : 0) + (z_bias_gradient ? 1 : 0)) * width + column;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        if (affine_gradient) {
            partial[int64_t(k) * features] = dweight[k];
            partial[width + int64_t(k) * features] = dbias[k];
        }
        if (z_bias_gradient) partial[(affine_gradient ? 2 : 0) * width + int64_t(k) * features] = dz_bias[k];
    }
}

// Stores the size in `workspace_bytes` if that is given, and runs otherwise.
template <class C, int K>
cudaError_t backward(Launch& launch, const GpuDevice& device, void* workspace, int64_t* workspace_bytes) {
    const GatesCall& call = launch.call;
    const int64_t sums = (call.dweight != nullptr ? 2 : 0) + (call.dz_bias != nullptr ? 1 : 0),
                  width = K * call.features;
    const auto constant = [](const Rows& rows) { return ConstRows{rows.data, rows.stride}; };
    const bool aligned =
        is_aligned<Z>({call.z, call.hidden, call.dh, constant(call.dz), constant(call.dhidden)}, call.features, W) &&
        is_aligned<C>({call.c, call.dc, constant(call.dc_in)}, call.features, W) && is_aligned_affine(call);
    const bool narrow = aligned && call.features <= narrow_features;
    const int threads = narrow ? int(round_up(call.features / W, 32 * V) / V) : any_threads;
    const int64_t column_blocks = narrow ? 1 : (call.features + any_threads - 1) / any_threads;
    const bool z_bias_gradient = call.dz_bias != nullptr;
    int resident = 0;
    const cudaError_t error = !narrow ? resident_blocks<wide_backward<C, K>>(device, threads, &resident)
                              : z_bias_gradient
                                  ? resident_blocks<narrow_backward<C, K, true>>(device, threads, &resident)
                                  : resident_blocks<narrow_backward<C, K, false>>(device, threads, &resident);
    if (error != cudaSuccess) return error;
    const int64_t programs = std::min<int64_t>(call.rows, std::max<int64_t>(1, resident / column_blocks));
    const int64_t partial_bytes = round_up(programs * sums * width * int64_t(sizeof(float)), 256);
    const bool needs_statistics = !narrow && call.norm != Norm::none;
    if (workspace_bytes != nullptr) {
        *workspace_bytes =
            partial_bytes + (needs_statistics ? call.rows * statistics_of_a_row * int64_t(sizeof(float)) : 0);
        return cudaSuccess;
    }
    launch.partial = static_cast<float*>(workspace);
    launch.statistics = reinterpret_cast<float*>(static_cast<char*>(workspace) + partial_bytes);
    if (needs_statistics) {
        const int row_threads = int(std::min<int64_t>(any_threads, round_up(call.features, 32)));
        const cudaError_t failed = launch_rows<row_statistics<C, K>>(launch, call.rows, device, row_threads, 1);
        if (failed != cudaSuccess) return failed;
    }
    if (!narrow) {
        wide_backward<C, K><<<dim3(unsigned(column_blocks), unsigned(programs)), threads, 0, device.stream>>>(launch);
    } else if (z_bias_gradient) {
        narrow_backward<C, K, true><<<unsigned(programs), threads, 0, device.stream>>>(launch);
    } else {
        narrow_backward<C, K, false><<<unsigned(programs), threads, 0, device.stream>>>(launch);
    }
    const cudaError_t failed = cudaGetLastError();
    if (failed != cudaSuccess || sums == 0) return failed;
    return sum_partials(launch, programs, device.stream);
}

}  // namespace
}  // namespace DEPTHLSTM_Z_NAMESPACE

cudaError_t DEPTHLSTM_Z_FUNCTION(backward)(Launch& launch, const GpuDevice& device, void* workspace,
                                           int64_t* workspace_bytes) {
    const bool own = launch.call.c_dtype == launch.call.z_dtype, given = launch.call.hidden.data != nullptr;
    if (given)
        return own ? DEPTHLSTM_Z_NAMESPACE::backward<DEPTHLSTM_Z, 3>(launch, device, workspace, workspace_bytes)
                   : DEPTHLSTM_Z_NAMESPACE::backward<float, 3>(launch, device, workspace, workspace_bytes);
    return own ? DEPTHLSTM_Z_NAMESPACE::backward<DEPTHLSTM_Z, 4>(launch, device, workspace, workspace_bytes)
               : DEPTHLSTM_Z_NAMESPACE::backward<float, 4>(launch, device, workspace, workspace_bytes);
}

}  // namespace depthlstm
