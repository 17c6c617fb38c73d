// The arithmetic, logic and conversion instructions of PTX. Integers wrap; floating point is IEEE's, in any direction.
#pragma once
#include <cfenv>
#include <limits>

#include "types.h"

namespace ptx {

// ---- integers

template <std::integral T>
INLINE T add(T a, T b) {
    return static_cast<T>(u64(a) + u64(b));
}
template <std::integral T>
INLINE T subtract(T a, T b) {
    return static_cast<T>(u64(a) - u64(b));
}
template <std::integral T>
INLINE T multiply_low(T a, T b) {
    return static_cast<T>(u64(a) * u64(b));
}
template <std::integral T>
INLINE T multiply_high(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, s128, u128>;
    return static_cast<T>((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}
template <class Wide, std::integral T>
INLINE Wide multiply_wide(T a, T b) {
    return static_cast<Wide>(Wide(a) * Wide(b));
}
// Division by zero gives all bits set. The one quotient that overflows gives the dividend. Both are undefined in PTX.
template <std::integral T>
INLINE T divide(T a, T b) {
    if (b == 0) return static_cast<T>(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return subtract(T(0), a);
    return a / b;
}
template <std::integral T>
INLINE T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return a % b;
}
template <std::integral T>
INLINE T minimum(T a, T b) {
    return a < b ? a : b;
}
template <std::integral T>
INLINE T maximum(T a, T b) {
    return a > b ? a : b;
}
template <std::integral T>
INLINE T absolute(T a) {
    return a < 0 ? subtract(T(0), a) : a;
}
template <std::integral T>
INLINE T negate(T a) {
    return subtract(T(0), a);
}

// ---- bits

// Shifts by the width of the type or more leave nothing, or the sign.
template <std::integral T>
INLINE T shift_left(T a, u32 count) {
    return count >= 8 * sizeof(T) ? T(0) : static_cast<T>(std::make_unsigned_t<T>(a) << count);
}
template <std::integral T>
INLINE T shift_right(T a, u32 count) {
    if (count < 8 * sizeof(T)) return static_cast<T>(a >> count);
    return static_cast<T>(a < 0 ? -1 : 0);
}
INLINE u32 funnel_left(u32 low, u32 high, u32 count, bool clamp) {
    count = clamp ? std::min(count, 32u) : count & 31;
    return static_cast<u32>((u64(high) << 32 | low) << count >> 32);
}
INLINE u32 funnel_right(u32 low, u32 high, u32 count, bool clamp) {
    count = clamp ? std::min(count, 32u) : count & 31;
    return static_cast<u32>((u64(high) << 32 | low) >> count);
}
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i) & 15;
        u32 byte = bytes >> (8 * (nibble & 7)) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign in all bits
        result |= byte << (8 * i);
    }
    return result;
}
template <class T>
inline T logic3(T a, T b, T c, u32 table) {
    T result = 0;
    for (int row = 0; row < 8; row++) {
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    }
    return result;
}
template <std::integral T>
inline T extract_bits(T a, u32 start, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    start &= 0xff;
    length &= 0xff;
    const bool negative =
        std::is_signed_v<T> && length > 0 && shift_right(a, std::min(start + length - 1, width - 1)) & 1;
    T result = 0;
    for (u32 i = 0; i < width; i++) {
        const bool bit = i >= length || start + i >= width ? negative : shift_right(a, start + i) & 1;
        result |= shift_left(T(bit), i);
    }
    return result;
}
template <class T>
inline T insert_bits(T source, T target, u32 start, u32 length) {
    constexpr u32 width = 8 * sizeof(T);
    start &= 0xff;
    length &= 0xff;
    for (u32 i = 0; i < length && start + i < width; i++) {
        const T bit = T(1) << (start + i);
        target = shift_right(source, i) & 1 ? target | bit : target & ~bit;
    }
    return target;
}
template <class T>
inline T reverse_bits(T a) {
    T result = 0;
    for (u32 i = 0; i < 8 * sizeof(T); i++) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}
template <std::integral T>
inline u32 find_leading_bit(T a, bool as_shift) {
    using Unsigned = std::make_unsigned_t<T>;
    const Unsigned magnitude = a < 0 ? ~Unsigned(a) : Unsigned(a);
    if (magnitude == 0) return ~0u;
    const int position = 8 * int(sizeof(T)) - 1 - std::countl_zero(magnitude);
    return as_shift ? 8 * int(sizeof(T)) - 1 - position : position;
}

// ---- floating point

// The type of the arithmetic: the operand's own, or double for 16 bits.
template <Floating T>
INLINE auto wide(T a) {
    if constexpr (Small<T>) {
        return double(a);
    } else {
        return a;
    }
}
template <Floating T>
inline T flush_subnormal(T a) {
    using Code = Raw<T>;
    constexpr Code sign = Code(1) << (8 * sizeof(T) - 1);
    constexpr int fraction_bits = std::same_as<T, f16>    ? 10
                                  : std::same_as<T, bf16> ? 7
                                                          : std::numeric_limits<T>::digits - 1;
    const Code code = std::bit_cast<Code>(a);
    return (code & ~sign) >> fraction_bits ? a : std::bit_cast<T>(static_cast<Code>(code & sign));
}
template <Floating T>
INLINE T saturate(T a) {
    const auto value = wide(a);
    return T(std::isnan(value) || value <= 0 ? 0 : value > 1 ? 1 : value);
}
template <Floating T>
INLINE T rectify(T a) {
    return std::isnan(wide(a)) || wide(a) > 0 ? a : T(0);
}

// A value that is computed here and unknown to the compiler.
template <class T>
INLINE T opaque(T value) {
    asm volatile("" : "+m"(value));
    return value;
}
// `operation` under another rounding direction of <cfenv>; opaque values keep the arithmetic between the two calls.
template <std::floating_point Result, class Operation, class... T>
INLINE Result rounded(int direction, Operation operation, T... operands) {
    std::fesetround(direction);
    const Result result = opaque(Result(operation(opaque(operands)...)));
    std::fesetround(FE_TONEAREST);
    return result;
}

template <int Direction = FE_TONEAREST, class Operation, std::floating_point T, class... More>
INLINE T directed(Operation operation, T a, More... more) {
    if constexpr (Direction == FE_TONEAREST) {
        return operation(a, more...);
    } else {
        return rounded<T>(Direction, operation, a, more...);
    }
}
template <int Direction = FE_TONEAREST, Floating T>
INLINE T add(T a, T b) {
    return T(directed<Direction>([](auto x, auto y) { return x + y; }, wide(a), wide(b)));
}
template <int Direction = FE_TONEAREST, Floating T>
INLINE T subtract(T a, T b) {
    return T(directed<Direction>([](auto x, auto y) { return x - y; }, wide(a), wide(b)));
}
template <int Direction = FE_TONEAREST, Floating T>
INLINE T multiply(T a, T b) {
    return T(directed<Direction>([](auto x, auto y) { return x * y; }, wide(a), wide(b)));
}
template <int Direction = FE_TONEAREST, std::floating_point T>
INLINE T divide(T a, T b) {
    return directed<Direction>([](T x, T y) { return x / y; }, a, b);
}
template <int Direction = FE_TONEAREST, std::floating_point T>
INLINE T square_root(T a) {
    return directed<Direction>([](T x) { return std::sqrt(x); }, a);
}
// The sum rounded to odd. Rounding it again to fewer bits equals rounding once.
inline double add_to_odd(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double part = sum - a;
    const double error = (a - (sum - part)) + (b - part);
    if (error == 0 || std::bit_cast<u64>(sum) & 1) return sum;
    return std::nextafter(
        sum, error > 0 ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity());
}
template <int Direction = FE_TONEAREST, Floating T>
INLINE T fused_multiply_add(T a, T b, T c) {
    if constexpr (Small<T>) {
        return T(add_to_odd(double(a) * double(b), c));  // the product of two is exact
    } else {
        return directed<Direction>([](T x, T y, T z) { return std::fma(x, y, z); }, a, b, c);
    }
}

template <Floating T>
INLINE T not_a_number() {
    return T(std::numeric_limits<double>::quiet_NaN());
}
// The minimum; of a number and a NaN, the number. -0 is less than +0.
template <Floating T>
INLINE T minimum(T first, T second) {
    const auto a = wide(first), b = wide(second);
    if (std::isnan(a)) return std::isnan(b) ? not_a_number<T>() : second;
    if (std::isnan(b)) return first;
    return a < b || (a == b && std::signbit(a)) ? first : second;
}
template <Floating T>
INLINE T negate(T a) {
    return std::bit_cast<T>(static_cast<Raw<T>>(std::bit_cast<Raw<T>>(a) ^ Raw<T>(1) << (8 * sizeof(T) - 1)));
}
template <Floating T>
INLINE T absolute(T a) {
    return std::signbit(wide(a)) ? negate(a) : a;
}
template <Floating T>
INLINE T maximum(T a, T b) {
    return negate(minimum(negate(a), negate(b)));
}
template <Floating T>
INLINE T minimum_or_nan(T a, T b) {
    return std::isnan(wide(a)) || std::isnan(wide(b)) ? not_a_number<T>() : minimum(a, b);
}
template <Floating T>
INLINE T maximum_or_nan(T a, T b) {
    return std::isnan(wide(a)) || std::isnan(wide(b)) ? not_a_number<T>() : maximum(a, b);
}
template <Floating T>
INLINE T copy_sign(T sign, T magnitude) {
    return std::signbit(wide(sign)) == std::signbit(wide(magnitude)) ? magnitude : negate(magnitude);
}

// `operation` on each of the two halves of a register.
template <class T, class Operation, class Register, class... Registers>
INLINE Register packed(Operation operation, Register first, Registers... more) {
    constexpr int width = 8 * sizeof(T);
    const auto low = raw(operation(as<T>(first), as<T>(more)...));
    const auto high = raw(operation(as<T>(Raw<T>(first >> width)), as<T>(Raw<T>(more >> width))...));
    return Register(Raw<T>(high)) << width | Raw<T>(low);
}

// ---- conversions

template <int Direction, std::floating_point To, class From>
INLINE To convert_to_float(From a) {
    if constexpr (Direction == FE_TONEAREST) {
        return To(a);
    } else {
        return rounded<To>(Direction, [](From value) { return To(value); }, a);
    }
}
// Numbers beyond the integers become the nearest one. A NaN becomes 0, or the top bit alone if either type has 64 bits.
template <int Direction, std::integral To, Floating From>
inline To convert_to_integer(From a) {
    const double value = wide(a);
    if (std::isnan(value)) return std::max(sizeof(To), sizeof(From)) == 8 ? To(u64(1) << (8 * sizeof(To) - 1)) : To(0);
    const double whole = Direction == FE_TONEAREST    ? std::nearbyint(value)
                         : Direction == FE_TOWARDZERO ? std::trunc(value)
                         : Direction == FE_DOWNWARD   ? std::floor(value)
                                                      : std::ceil(value);
    const double above = std::ldexp(1.0, std::numeric_limits<To>::digits);
    if (whole >= above) return std::numeric_limits<To>::max();
    if (whole < (std::is_signed_v<To> ? -above : 0.0)) return std::numeric_limits<To>::min();
    return static_cast<To>(whole);
}
template <std::integral To, std::integral From>
INLINE To convert_saturating(From a) {
    const s128 lowest = std::numeric_limits<To>::min(), highest = std::numeric_limits<To>::max(), value = a;
    return static_cast<To>(std::clamp(value, lowest, highest));
}
template <Floating T>
INLINE T round_to_integer(T a, int direction) {
    const auto value = wide(a);
    return T(direction == FE_TONEAREST    ? std::nearbyint(value)
             : direction == FE_TOWARDZERO ? std::trunc(value)
             : direction == FE_DOWNWARD   ? std::floor(value)
                                          : std::ceil(value));
}

}  // namespace ptx
