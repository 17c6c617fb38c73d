"""Comparisons, conversions and approximations of PTX, as in ptx_formulas.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ptx_formulas import DIRECTIONS, FORMATS, PACKED, Number, decode, encode, finish, flush, integer, is_negative

# ---- comparison


def compare(name: str, a: Number | int, b: Number | int) -> bool:
    """Compare two numbers; with a NaN only the comparisons that end in u hold."""
    if name in ("num", "nan"):
        return (a == a and b == b) == (name == "num")
    if a != a or b != b:
        return len(name) == 3
    stem = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:2])
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[stem]


def comparison(opcode: str, operands: Sequence[int]) -> bool:
    """Compare the first two operands of setp and set."""
    _, name, *modifiers, type_ = opcode.split(".")
    if type_ not in FORMATS:
        return compare(name, *(integer(type_, code) for code in operands[:2]))
    format = FORMATS[type_]
    codes = [flush(format, code) if "ftz" in modifiers else code for code in operands[:2]]
    return compare(name, *(decode(format, code) for code in codes))


def set_predicate(opcode: str, operands: Sequence[int]) -> int:
    """Return bit 0, the predicate, and bit 1, the predicate of the opposite comparison."""
    combine = {"and": bool.__and__, "or": bool.__or__, "xor": bool.__xor__}
    modifiers = opcode.split(".")[2:-1]
    assert set(modifiers) <= {*combine, "ftz"}, opcode
    found = comparison(opcode, operands)
    both = [found, not found]
    for name in set(modifiers) & set(combine):
        both = [combine[name](value, bool(operands[2])) for value in both]
    return both[0] | both[1] << 1


def set_two_predicates(opcode: str, operands: Sequence[int]) -> int:
    stem, _, type_ = opcode.rpartition(".")
    halves = [[code >> shift & 0xFFFF for code in operands[:2]] for shift in (0, 16)]
    low, high = (comparison(f"{stem}.{PACKED[type_]}", half) for half in halves)
    return low | high << 1


def set_value(opcode: str, operands: Sequence[int]) -> int:
    result = opcode.split(".")[-2]
    assert set(opcode.split(".")[2:-2]) <= {"ftz"}, opcode
    return (0x3F800000 if result == "f32" else 0xFFFFFFFF) if comparison(opcode, operands) else 0


def select(opcode: str, operands: Sequence[int]) -> int:
    return operands[0] if operands[2] else operands[1]


# ---- conversion

WHOLE = {f"{direction}i": direction for direction in DIRECTIONS}


def to_integer(value: Fraction, direction: str) -> int:
    return {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}[direction](value)


def conversion(opcode: str, operands: Sequence[int]) -> int:
    """Compute cvt of one operand; the result has the bits of the target's type."""
    _, *modifiers, target, source = opcode.split(".")
    assert set(modifiers) <= {*DIRECTIONS, *WHOLE, "ftz", "sat", "relu"}, opcode
    whole = next((WHOLE[part] for part in modifiers if part in WHOLE), None)
    direction = next((part for part in modifiers if part in DIRECTIONS), "rn")
    code, value, negative = operands[0], Fraction(0), False
    if source in FORMATS:
        format = FORMATS[source]
        code = flush(format, code) if "ftz" in modifiers and source == "f32" else code
        value, negative = decode(format, code), is_negative(format, code)
    else:
        value = Fraction(integer(source, code))
    if target in FORMATS:
        if whole is not None and isinstance(value, Fraction):
            value = Fraction(to_integer(value, whole))
        result = encode(FORMATS[target], value, direction, negative)
        # the .ftz of the source does not flush a result of larger range
        return finish(FORMATS[target], modifiers if target != "f64" else (), result)
    return integer_result(target, source, value, whole, "sat" in modifiers)


def integer_result(target: str, source: str, value: Number, whole: str | None, saturating: bool) -> int:
    bits = int(target[1:])
    lowest, highest = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if target[0] == "s" else (0, (1 << bits) - 1)
    if isinstance(value, float):
        if value != value:
            return 1 << (bits - 1) if max(bits, FORMATS[source].bits) == 64 else 0
        return (highest if value > 0 else lowest) % (1 << bits)
    number = to_integer(value, whole or "rz")
    if source in FORMATS or saturating:
        number = min(max(number, lowest), highest)
    return number % (1 << bits)


def to_packed(opcode: str, operands: Sequence[int]) -> int:
    """Compute cvt of two floats; the first is the upper half."""
    stem, target, _ = opcode.rsplit(".", 2)
    high, low = (conversion(f"{stem}.{PACKED[target]}.f32", [code]) for code in operands[:2])
    return high << 16 | low


# ---- approximations

FUNCTIONS = {
    "ex2": lambda a: 2.0**a if a < 1000 else math.inf,
    "lg2": lambda a: -math.inf if a == 0 else math.log2(a),
    "rcp": lambda a: math.copysign(math.inf, a) if a == 0 else 1 / a,
    "rsqrt": lambda a: math.copysign(math.inf, a) if a == 0 else 1 / math.sqrt(a),
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
}


def exact_value(operation: str, values: Sequence[float]) -> float:
    """Return the exact value of an approximation; NaN where it is undefined."""
    if any(math.isnan(value) for value in values):
        return math.nan
    try:
        if operation == "div":
            a, b = values
            sign = math.copysign(1, a) * math.copysign(1, b)
            return a / b if b else math.nan if a == 0 else sign * math.inf
        return FUNCTIONS[operation](values[0])
    except ValueError:
        return math.nan


def largest_error(opcode: str, exact: float, argument: float) -> float:
    """Return the absolute error that the PTX ISA allows."""
    operation, *modifiers, type_ = opcode.split(".")
    ulp = math.ulp(abs(exact)) * 2**29  # of a float, where it is a normal one
    absolute = {"sin": -20.5, "cos": -20.5}
    relative = {"ex2": -22.5, "rsqrt": -22.9, "sqrt": -23, "tanh": -11}
    if type_ in ("f16", "bf16"):
        if operation == "tanh":
            return 2 ** (-10.987 if type_ == "f16" else -8)
        return abs(exact) * 2 ** (-9.9 if type_ == "f16" else -7)
    if operation in absolute:
        return 2 ** absolute[operation]
    if operation == "lg2":
        return 2**-22 * (1 if 0.5 < argument < 2 else abs(exact))
    if operation in ("div", "rcp"):
        return ulp * (2 if operation == "div" else 1)
    assert set(modifiers) <= {"approx", "ftz"}
    return abs(exact) * 2 ** relative[operation]
