// The types of PTX instructions. A register holds raw bits; as<T>() reads them as a value of an instruction's type,
// raw() converts back.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <type_traits>

#define INLINE [[gnu::always_inline]] inline
// as<f32>(), raw() and their like for f64 without a call, of which a kernel has thousands
#define bits_float(bits) __builtin_bit_cast(float, bits)
#define bits_double(bits) __builtin_bit_cast(double, bits)
#define float_bits(value) __builtin_bit_cast(uint32_t, value)
#define double_bits(value) __builtin_bit_cast(uint64_t, value)

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using s128 = __int128;
using f32 = float;
using f64 = double;

// A 16-bit floating-point number; arithmetic happens in double.
template <int ExponentBits, int FractionBits>
struct SmallFloat {
    static constexpr int bias = (1 << (ExponentBits - 1)) - 1;
    static constexpr u16 infinity = ((1 << ExponentBits) - 1) << FractionBits;
    static constexpr u16 not_a_number = 0x7fff;
    u16 code = 0;

    SmallFloat() = default;

    // Rounded to the nearest, ties to even, or toward zero.
    explicit SmallFloat(double value, bool toward_zero = false) {
        const u64 bits = std::bit_cast<u64>(value);
        const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
        const u16 sign = bits >> 48 & 0x8000;
        if (std::isnan(value)) {
            code = not_a_number;
        } else if (std::isinf(value)) {
            code = sign | infinity;
        } else {
            const u64 significand = (bits & ((u64(1) << 52) - 1)) | u64(value != 0 && exponent > -1023) << 52;
            const int dropped = std::min(52 - FractionBits + std::max(0, 1 - bias - exponent), 54);
            const u64 rest = significand & ((u64(1) << dropped) - 1);
            const u64 half = u64(1) << (dropped - 1);
            u64 kept = significand >> dropped;
            if (!toward_zero && (rest > half || (rest == half && (kept & 1)))) kept++;
            // the leading bit of `kept`, if there is one, adds 1 to the exponent field
            const s64 magnitude = (s64(std::max(exponent, 1 - bias) + bias - 1) << FractionBits) + s64(kept);
            const s64 largest = toward_zero ? infinity - 1 : infinity;
            code = sign | static_cast<u16>(std::min(magnitude, largest));
        }
    }

    operator double() const {
        const u64 sign = u64(code & 0x8000) << 48;
        const int exponent = (code & 0x7fff) >> FractionBits;
        const u64 fraction = code & ((1 << FractionBits) - 1);
        if ((code & 0x7fff) >= infinity)
            return std::bit_cast<double>(sign | u64(0x7ff) << 52 | fraction << (52 - FractionBits));
        if (exponent == 0)
            return std::bit_cast<double>(sign |
                                         std::bit_cast<u64>(std::ldexp(double(fraction), 1 - bias - FractionBits)));
        return std::bit_cast<double>(sign | u64(exponent - bias + 1023) << 52 | fraction << (52 - FractionBits));
    }
};
using f16 = SmallFloat<5, 10>;
using bf16 = SmallFloat<8, 7>;

template <class T>
concept Small = std::same_as<T, f16> || std::same_as<T, bf16>;
template <class T>
concept Floating = std::floating_point<T> || Small<T>;

template <int Bytes>
struct Bits;
template <>
struct Bits<1> {
    using type = u8;
};
template <>
struct Bits<2> {
    using type = u16;
};
template <>
struct Bits<4> {
    using type = u32;
};
template <>
struct Bits<8> {
    using type = u64;
};
template <>
struct Bits<16> {
    using type = u128;
};
template <class T>
using Raw = Bits<sizeof(T)>::type;

// A register may be wider than the type of the instruction. Its low bits count.
template <class T, class Register>
INLINE T as(Register bits) {
    static_assert(sizeof(Register) >= sizeof(T), "a register narrower than the type of its instruction");
    return std::bit_cast<T>(static_cast<Raw<T>>(bits));
}

// An integer stays one, so that a signed value extends its sign into a wider register.
template <class T>
INLINE auto raw(T value) {
    if constexpr (Floating<T>) {
        return std::bit_cast<Raw<T>>(value);
    } else {
        return value;
    }
}

}  // namespace ptx
