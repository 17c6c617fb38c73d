// The `approx` instructions. The results of hardware are not specified, only a bound of their error. Here the exact
// result is moved by an error up to that bound. A hash of the operands chooses the error, so tests meet errors of that
// size, the same ones in each run. A result that the type holds exactly (0, infinity, 2^3, 1/4) is returned unchanged.
#pragma once
#include "arithmetic.h"

namespace ptx {

// Largest relative errors that the PTX ISA states, as powers of two; ulp: in units of the last place.
constexpr double exp2_error = -22.5, rsqrt_error = -22.9, sqrt_error = -23, tanh_error = -11;
constexpr double log2_error = -22;    // absolute between 0.5 and 2
constexpr double sine_error = -20.5;  // absolute
constexpr double exp2_f16_error = -9.9, exp2_bf16_error = -7;
constexpr double tanh_f16_error = -10.987, tanh_bf16_error = -8;  // absolute

// From -1 to 1, a different number for each operand and operation.
inline double hashed_error(u64 operand, u64 operation) {
    u64 hash = operand * 0x9e3779b97f4a7c15 + operation * 0xd1b54a32d192ed03;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
    return static_cast<double>(static_cast<s64>(hash ^ hash >> 31)) / 0x1p63;
}
// `exact` with an error of at most `bound` (absolute) after rounding to T.
template <Floating T>
inline T perturbed(double exact, double bound, u64 operand, u64 operation) {
    const T nearest(exact);
    if (double(nearest) == exact || std::isnan(exact) || std::isinf(double(nearest))) return nearest;
    const T moved(exact + hashed_error(operand, operation) * bound);
    return std::abs(double(moved) - exact) <= bound && std::isfinite(double(moved)) ? moved : nearest;
}
template <Floating T>
inline T perturbed_relative(double exact, double exponent, T operand, u64 operation) {
    return perturbed<T>(exact, std::abs(exact) * std::exp2(exponent), raw(operand), operation);
}
template <Floating T>
inline T perturbed_absolute(double exact, double exponent, T operand, u64 operation) {
    return perturbed<T>(exact, std::exp2(exponent), raw(operand), operation);
}
inline f32 perturbed_ulp(double exact, int units, u64 operands, u64 operation) {
    const f32 magnitude = std::abs(static_cast<f32>(exact));
    const double ulp = double(std::nextafter(magnitude, std::numeric_limits<f32>::infinity())) - magnitude;
    return perturbed<f32>(exact, ulp * units, operands, operation);
}

template <Floating T>
inline T exp2_approximate(T a) {
    return perturbed_relative(std::exp2(wide(a) * 1.0),
                              std::same_as<T, f32>   ? exp2_error
                              : std::same_as<T, f16> ? exp2_f16_error
                                                     : exp2_bf16_error,
                              a, 1);
}
template <Floating T>
inline T tanh_approximate(T a) {
    if (a == T(0)) return a;
    if constexpr (std::same_as<T, f32>) {
        return perturbed_relative(std::tanh(double(a)), tanh_error, a, 2);
    } else {
        return perturbed_absolute(std::tanh(double(a)), std::same_as<T, f16> ? tanh_f16_error : tanh_bf16_error, a, 2);
    }
}
inline f32 log2_approximate(f32 a) {
    const double exact = std::log2(double(a));
    return a > 0.5f && a < 2 ? perturbed_absolute(exact, log2_error, a, 3)
                             : perturbed_relative(exact, log2_error, a, 3);
}
inline f32 reciprocal_approximate(f32 a) { return perturbed_ulp(1 / double(a), 1, raw(a), 4); }
inline f32 rsqrt_approximate(f32 a) { return perturbed_relative(1 / std::sqrt(double(a)), rsqrt_error, a, 5); }
inline f32 sqrt_approximate(f32 a) { return perturbed_relative(std::sqrt(double(a)), sqrt_error, a, 6); }
inline f32 sine_approximate(f32 a) { return a == 0 ? a : perturbed_absolute(std::sin(double(a)), sine_error, a, 7); }
inline f32 cosine_approximate(f32 a) { return perturbed_absolute(std::cos(double(a)), sine_error, a, 8); }
inline f32 divide_full(f32 a, f32 b) { return perturbed_ulp(double(a) / double(b), 2, u64(raw(a)) << 32 | raw(b), 9); }
// Hardware does not support divisors beyond 2^126: it gives 0, and NaN for infinity over one of them.
inline f32 divide_approximate(f32 a, f32 b) {
    if (std::isfinite(b) && std::abs(b) > 0x1p126f && !std::isnan(a)) {
        return std::isinf(a) ? not_a_number<f32>() : std::copysign(0.0f, a) * std::copysign(1.0f, b);
    }
    return divide_full(a, b);
}

}  // namespace ptx
