// What the ops' programs share: values of every type, comparison, a plain norm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/types.h"
#include "guarded.h"

namespace depthlstm::smoke {

constexpr int64_t kRows = 3;

inline size_t size_of(DType type) { return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2; }

inline float half_to_float(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                            : std::ldexp(float(mantissa + 1024), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

struct Buffer : Guarded {
    DType type;
    int64_t count;

    Buffer(DType type, int64_t count)
        : Guarded(count * int64_t(size_of(type)), int64_t(size_of(type))), type(type), count(count) {}

    double get(int64_t i) const {
        if (type == DType::float64) return reinterpret_cast<const double*>(data)[i];
        if (type == DType::float32) return reinterpret_cast<const float*>(data)[i];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[i];
        if (type == DType::float16) return half_to_float(bits);
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    // Values are multiples of 1/32 below 4: exact in every type.
    void set(int64_t i, double value) {
        value = std::round(std::fmin(std::fmax(value, -3.5), 3.5) * 32) / 32;
        if (type == DType::float64) {
            reinterpret_cast<double*>(data)[i] = value;
        } else if (type == DType::float32) {
            reinterpret_cast<float*>(data)[i] = float(value);
        } else {
            const float single = float(value);
            uint32_t wide;
            std::memcpy(&wide, &single, 4);
            uint16_t bits = uint16_t(wide >> 16);
            if (type == DType::float16) {
                const int exponent = int((wide >> 23) & 255) - 127;
                bits = single == 0
                           ? 0
                           : uint16_t(((wide >> 16) & 0x8000) | ((exponent + 15) << 10) | ((wide >> 13) & 1023));
            }
            reinterpret_cast<uint16_t*>(data)[i] = bits;
        }
    }
    void randomise() {
        for (int64_t i = 0; i < count; ++i) set(i, random_value());
    }
};

struct Scratch : Guarded {
    explicit Scratch(int64_t bytes) : Guarded(bytes, 64) {}
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline int failures = 0;
inline int checks = 0;

// The words that name a call in messages, and how exact its results are.
struct Problem {
    std::string words;
    double relative;
    bool finite_only = false;
};

// A short type anywhere may stand for shorter arithmetic everywhere, so each output is compared at the shortest type in
// the call.
inline double relative_error(std::initializer_list<DType> types) {
    double relative = 0;
    for (DType type : types) {
        relative = std::fmax(relative, type == DType::float64   ? 1e-8
                                       : type == DType::float32 ? 2e-4
                                       : type == DType::float16 ? 4e-3
                                                                : 2e-2);
    }
    return relative;
}

inline void compare(const Problem& problem, const char* name, const Buffer& found, const std::vector<double>& wanted) {
    double largest = 0;
    for (double value : wanted) largest = std::fmax(largest, std::fabs(value));
    ++checks;
    for (int64_t i = 0; i < found.count; ++i) {
        const double value = found.get(i);
        if (problem.finite_only ? std::isfinite(value)
                                : std::fabs(value - wanted[i]) <= problem.relative * (1 + largest))
            continue;
        std::printf("wrong %s[%lld]: found %.9g, wanted %.9g (%s)\n", name, (long long)i, value, wanted[i],
                    problem.words.c_str());
        ++failures;
        return;
    }
}

// z or a stream, c or the other stream, and the parameters.
inline constexpr DType kTypes[][3] = {
    {DType::float32, DType::float32, DType::float32},    {DType::float64, DType::float64, DType::float64},
    {DType::bfloat16, DType::bfloat16, DType::float32},  {DType::float16, DType::float16, DType::float32},
    {DType::bfloat16, DType::float32, DType::float32},   {DType::float16, DType::float32, DType::float32},
    {DType::bfloat16, DType::bfloat16, DType::bfloat16}, {DType::float16, DType::float16, DType::float16}};

using Values = std::vector<double>;

// Rows of a tensor, `stride` elements apart. What lies between them is no part of them.
struct Matrix : Buffer {
    int64_t stride, features;

    Matrix(DType type, int64_t features, int64_t gap = 0)
        : Buffer(type, (kRows - 1) * (features + gap) + features), stride(features + gap), features(features) {}
    Values row(int64_t number) const {
        Values values(features);
        for (int64_t d = 0; d < features; ++d) values[d] = get(number * stride + d);
        return values;
    }
    ConstRows rows() const { return {data, stride}; }
    Rows written() { return {data, stride}; }
};

// A LayerNorm or RMSNorm in double, or none without a weight. `offset` is where its parameters begin.
struct PlainNorm {
    const Buffer *weight, *bias;
    bool rms;
    double eps;
    int64_t offset = 0;
    Values n = {}, dweight = {}, dbias = {};
    double r = 1;

    Values apply(const Values& v) {
        if (weight == nullptr) return v;
        const double size = double(v.size());
        double mean = 0, square = 0;
        for (double value : v) mean += rms ? 0 : value / size;
        for (double value : v) square += (value - mean) * (value - mean) / size;
        r = 1 / std::sqrt(square + eps);
        Values result(v.size());
        n.resize(v.size());
        for (size_t d = 0; d < v.size(); ++d) {
            n[d] = (v[d] - mean) * r;
            result[d] = weight->get(offset + d) * n[d] + (bias == nullptr ? 0 : bias->get(offset + d));
        }
        return result;
    }
    // The gradient of what `apply` was given last. Those of the parameters are added up.
    Values backward(const Values& gradient) {
        if (weight == nullptr) return gradient;
        const double size = double(gradient.size());
        dweight.resize(gradient.size());
        dbias.resize(gradient.size());
        double mean = 0, mean_n = 0;
        Values q(gradient.size());
        for (size_t d = 0; d < q.size(); ++d) {
            dweight[d] += gradient[d] * n[d];
            dbias[d] += gradient[d];
            q[d] = weight->get(offset + d) * gradient[d];
            mean += rms ? 0 : q[d] / size;
            mean_n += q[d] * n[d] / size;
        }
        for (size_t d = 0; d < q.size(); ++d) q[d] = r * (q[d] - mean - n[d] * mean_n);
        return q;
    }
};

inline void append(Values& to, const Values& row) { to.insert(to.end(), row.begin(), row.end()); }

inline Values sum(double a, const Values& x, double b, const Values& y) {
    Values result(x.size());
    for (size_t d = 0; d < x.size(); ++d) result[d] = a * x[d] + b * y[d];
    return result;
}

// The programs: each checks one op with the kernels of the chosen instruction set.
void smoke_depth_lstm();
void smoke_norm_step();
void smoke_siamese_step();
void smoke_depth_gru_gates();
void smoke_layer_mix();
void smoke_layer_attend();

}  // namespace depthlstm::smoke
