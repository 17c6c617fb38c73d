"""The results of PTX instructions in Python's exact arithmetic, independent of the simulator's C++.

Operands and results are the bits of registers. A formula gets an opcode, such as "add.rm.ftz.f32", and the operands'
bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

Number = Fraction | float  # a float is an infinity or a NaN
Formula = Callable[[str, Sequence[int]], int]


class Format(NamedTuple):
    """A binary floating-point format of IEEE 754."""

    exponent_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.fraction_bits

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.fraction_bits - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)


FORMATS = {"f16": Format(5, 10), "bf16": Format(8, 7), "f32": Format(8, 23), "f64": Format(11, 52)}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
DIRECTIONS = ("rn", "rz", "rm", "rp")


@functools.cache
def decode(format: Format, code: int) -> Number:
    magnitude = code & ~format.sign
    if magnitude > format.infinity:
        return math.nan
    sign = -1 if code & format.sign else 1
    if magnitude == format.infinity:
        return sign * math.inf
    exponent, fraction = divmod(magnitude, 1 << format.fraction_bits)
    significand = fraction + (1 << format.fraction_bits if exponent else 0)
    return sign * significand * Fraction(2) ** (max(exponent, 1) - format.bias - format.fraction_bits)


def encode(format: Format, value: Number, direction: str = "rn", negative_zero: bool = False) -> int:
    """Return the bits of ``value`` rounded in a direction; ``negative_zero`` gives the sign of an exact zero."""
    if isinstance(value, float):
        return format.nan if math.isnan(value) else format.infinity | (format.sign if value < 0 else 0)
    if value == 0:
        return format.sign if negative_zero else 0
    negative, magnitude = value < 0, abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, 1 - format.bias)
    scaled = magnitude / Fraction(2) ** (exponent - format.fraction_bits)
    kept = math.floor(scaled)
    rest = scaled - kept
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and kept % 2 == 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[direction]
    code = ((exponent + format.bias - 1) << format.fraction_bits) + kept + up
    if code >= format.infinity:
        largest = direction == "rz" or direction == ("rp" if negative else "rm")
        code = format.infinity - largest
    return code | (format.sign if negative else 0)


def flush(format: Format, code: int) -> int:
    return code & format.sign if code & ~format.sign < 1 << format.fraction_bits else code


def is_negative(format: Format, code: int) -> bool:
    return bool(code & format.sign)


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def parse(opcode: str, *known: str) -> tuple[str, list[str], str]:
    """Return (operation, modifiers, type); a modifier that the formula does not know is an error."""
    operation, *modifiers, type_ = opcode.split(".")
    assert set(modifiers) <= set(known), opcode
    return operation, modifiers, type_


def integer(type_: str, code: int) -> int:
    """Return the value of a register's bits as u32, s16, b64 and the like."""
    bits = int(type_[1:])
    return signed(code, bits) if type_[0] == "s" else code % (1 << bits)


def on_halves(formula: Formula) -> Formula:
    """Apply the formula to both halves of the operands if the type is packed."""

    @functools.wraps(formula)
    def packed(opcode: str, operands: Sequence[int]) -> int:
        stem, _, type_ = opcode.rpartition(".")
        if type_ not in PACKED:
            return formula(opcode, operands)
        element = PACKED[type_]
        bits = FORMATS[element].bits
        halves = [[operand >> shift & ((1 << bits) - 1) for operand in operands] for shift in (0, bits)]
        low, high = (formula(f"{stem}.{element}", half) for half in halves)
        return high << bits | low

    return packed


# ---- floating point


def finish(format: Format, modifiers: Sequence[str], code: int) -> int:
    """Apply .ftz, .relu and .sat to a result."""
    is_nan = code & ~format.sign > format.infinity
    if "ftz" in modifiers and not is_nan:
        code = flush(format, code)
    if "relu" in modifiers and is_negative(format, code) and not is_nan:
        code = 0
    if "sat" in modifiers:
        one = encode(format, Fraction(1))
        code = 0 if is_nan or is_negative(format, code) else min(code, one)
    return code


def multiply_add(format: Format, direction: str, a: int, b: int, c: int) -> int:
    """Compute a b + c, rounded once."""
    x, y, z = (decode(format, code) for code in (a, b, c))
    product_negative = is_negative(format, a) != is_negative(format, b)
    if any(isinstance(value, float) for value in (x, y, z)):
        if any(value != value for value in (x, y, z)) or {0, math.inf} <= {abs(x), abs(y)}:
            return format.nan
        product = (-math.inf if product_negative else math.inf) if math.inf in (abs(x), abs(y)) else 0.0
        return encode(format, product + (z if isinstance(z, float) else 0.0))
    total = x * y + z
    if x * y == 0 and z == 0 and product_negative == is_negative(format, c):
        zero = product_negative
    else:
        zero = direction == "rm"
    return encode(format, total, direction, zero)


@on_halves
def arithmetic(opcode: str, operands: Sequence[int]) -> int:
    operation, modifiers, type_ = parse(opcode, *DIRECTIONS, "ftz", "sat", "relu")
    format = FORMATS[type_]
    direction = next((part for part in modifiers if part in DIRECTIONS), "rn")
    codes = [flush(format, code) if "ftz" in modifiers else code for code in operands]
    one, minus_zero = encode(format, Fraction(1)), format.sign
    if operation in ("add", "sub"):
        other = codes[1] ^ (format.sign if operation == "sub" else 0)
        result = multiply_add(format, direction, codes[0], one, other)
    elif operation == "mul":
        negative = is_negative(format, codes[0]) != is_negative(format, codes[1])
        result = multiply_add(format, direction, codes[0], codes[1], minus_zero if negative else 0)
    else:
        assert operation in ("fma", "mad")
        result = multiply_add(format, direction, *codes)
    return finish(format, modifiers, result)


def division(opcode: str, operands: Sequence[int]) -> int:
    """Compute div, rcp and sqrt."""
    operation, modifiers, type_ = parse(opcode, *DIRECTIONS, "ftz")
    format, direction = FORMATS[type_], modifiers[0]
    codes = [flush(format, code) if "ftz" in modifiers else code for code in operands]
    if operation == "sqrt":
        return finish(format, modifiers, square_root(format, direction, codes[0]))
    a, b = (encode(format, Fraction(1)), codes[0]) if operation == "rcp" else codes
    x, y = decode(format, a), decode(format, b)
    sign = format.sign if is_negative(format, a) != is_negative(format, b) else 0
    if x != x or y != y or (x == 0 and y == 0) or (isinstance(x, float) and isinstance(y, float)):
        return format.nan
    if isinstance(x, float) or y == 0:
        return sign | format.infinity
    if isinstance(y, float) or x == 0:
        return sign
    return finish(format, modifiers, encode(format, x / y, direction))


def square_root(format: Format, direction: str, code: int) -> int:
    value = decode(format, code)
    if value == 0 or value == math.inf:
        return code
    if isinstance(value, float) or value < 0:
        return format.nan
    # a floor with many more bits than the format, and one bit for the rest below it
    scale = 4 ** (600 + format.fraction_bits)
    scaled = value * scale
    assert scaled.denominator == 1
    root = math.isqrt(scaled.numerator << 256)
    exact = root * root == scaled.numerator << 256
    return encode(format, Fraction(2 * root + (not exact), 2 * math.isqrt(scale << 256)), direction)


@on_halves
def extremum(opcode: str, operands: Sequence[int]) -> int:
    operation, modifiers, type_ = parse(opcode, "ftz", "NaN")
    format = FORMATS[type_]
    codes = [flush(format, code) if "ftz" in modifiers else code for code in operands]
    numbers = [code for code in codes if code & ~format.sign <= format.infinity]
    if not numbers or ("NaN" in modifiers and len(numbers) < 2):
        return format.nan
    # -0 is below 0
    return {"min": min, "max": max}[operation](
        numbers, key=lambda code: -(code ^ format.sign) - 1 if code & format.sign else code
    )


@on_halves
def sign(opcode: str, operands: Sequence[int]) -> int:
    operation, modifiers, type_ = parse(opcode, "ftz")
    format = FORMATS[type_]
    code = flush(format, operands[0]) if "ftz" in modifiers else operands[0]
    return code ^ format.sign if operation == "neg" else code & ~format.sign


def copy_sign(opcode: str, operands: Sequence[int]) -> int:
    _, _, type_ = parse(opcode)
    mask = FORMATS[type_].sign
    return operands[0] & mask | operands[1] & ~mask


def test_class(opcode: str, operands: Sequence[int]) -> int:
    _, (name,), type_ = parse(opcode, "finite", "infinite", "number", "notanumber", "normal", "subnormal")
    format = FORMATS[type_]
    magnitude = operands[0] & ~format.sign
    smallest = 1 << format.fraction_bits
    return {
        "finite": magnitude < format.infinity,
        "infinite": magnitude == format.infinity,
        "number": magnitude <= format.infinity,
        "notanumber": magnitude > format.infinity,
        "normal": smallest <= magnitude < format.infinity,
        "subnormal": 0 < magnitude < smallest,
    }[name]


# ---- integers


def integer_arithmetic(opcode: str, operands: Sequence[int]) -> int:
    operation, _, type_ = parse(opcode)
    bits = int(type_[1:])
    values = [integer(type_, code) for code in operands]
    a, b = values[0], values[-1]
    if operation in ("div", "rem"):  # division by zero is undefined
        quotient = 0 if b == 0 else abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)
        result = a - quotient * b if operation == "rem" else -1 if b == 0 else quotient
        return result % (1 << bits)
    result = {"add": a + b, "sub": a - b, "min": min(a, b), "max": max(a, b), "neg": -a, "abs": abs(a)}[operation]
    return result % (1 << bits)


def multiplication(opcode: str, operands: Sequence[int]) -> int:
    operation, (part,), type_ = parse(opcode, "lo", "hi", "wide")
    bits = int(type_[1:])
    product = integer(type_, operands[0]) * integer(type_, operands[1])
    result = product >> bits if part == "hi" else product
    result += operands[2] if operation == "mad" else 0
    return result % (1 << (2 * bits if part == "wide" else bits))


def bit_logic(opcode: str, operands: Sequence[int]) -> int:
    operation, _, type_ = parse(opcode)
    bits = 1 if type_ == "pred" else int(type_[1:])
    a, b = operands[0], operands[-1]
    return {"and": a & b, "or": a | b, "xor": a ^ b, "not": ~a}[operation] % (1 << bits)


def shift(opcode: str, operands: Sequence[int]) -> int:
    operation, _, type_ = parse(opcode)
    bits = int(type_[1:])
    value, count = integer(type_, operands[0]), min(operands[1], bits)
    return (value << count if operation == "shl" else value >> count) % (1 << bits)


def funnel_shift(opcode: str, operands: Sequence[int]) -> int:
    _, (side, mode), _ = parse(opcode, "l", "r", "wrap", "clamp")
    low, high, count = operands
    count = min(count, 32) if mode == "clamp" else count % 32
    both = high << 32 | low
    return (both << count >> 32 if side == "l" else both >> count) % (1 << 32)


def permute(opcode: str, operands: Sequence[int]) -> int:
    assert opcode == "prmt.b32"
    pool = operands[0].to_bytes(4, "little") + operands[1].to_bytes(4, "little")
    result = []
    for nibble in range(4):
        selector = operands[2] >> 4 * nibble
        byte = pool[selector & 7]
        result.append((0xFF if byte >= 0x80 else 0) if selector & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def extract_bits(opcode: str, operands: Sequence[int]) -> int:
    _, _, type_ = parse(opcode)
    bits = int(type_[1:])
    start, length = operands[1] & 0xFF, operands[2] & 0xFF
    # zeros, or the sign, fill the bits beyond the register
    value = integer(type_, operands[0]) >> start
    if length == 0:
        return 0
    value %= 1 << min(length, bits)
    if type_[0] == "s" and length < bits:
        top = min(start + length, bits) - 1
        if operands[0] >> top & 1:
            value |= ~0 << min(length, max(0, bits - start))
    return value % (1 << bits)


def insert_bits(opcode: str, operands: Sequence[int]) -> int:
    _, _, type_ = parse(opcode)
    bits = int(type_[1:])
    source, target, start, length = operands
    mask = ((1 << (length & 0xFF)) - 1) << (start & 0xFF)
    return (target & ~mask | (source << (start & 0xFF)) & mask) % (1 << bits)


def bit_count(opcode: str, operands: Sequence[int]) -> int:
    operation, _, type_ = parse(opcode)
    text = format(operands[0], f"0{type_[1:]}b")
    return {"popc": text.count("1"), "clz": len(text) - len(text.lstrip("0")), "brev": int(text[::-1], 2)}[operation]


def leading_bit(opcode: str, operands: Sequence[int]) -> int:
    _, modifiers, type_ = parse(opcode, "shiftamt")
    value = integer(type_, operands[0])
    length = (~value if value < 0 else value).bit_length()
    if length == 0:
        return 0xFFFFFFFF
    return int(type_[1:]) - length if modifiers else length - 1


def is_nan(format: Format, code: int, is_packed: bool = False) -> bool:
    """Return whether the bits are a NaN, or either half of packed ones is."""
    halves = (code >> format.bits, code % (1 << format.bits)) if is_packed else (code,)
    return any(half & ~format.sign > format.infinity for half in halves)
