"""Every instruction of the simulator that computes, against formulas in exact arithmetic.

The operands are special and random values.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import ptx_conversions as conversions
import ptx_formulas as formulas
import pytest
from ptx_formulas import FORMATS, PACKED, Formula
from ptx_kernels import HEAD, bits_of, build_folder, register, width
from ptx_values import CASES, operands
from test_ptx_control import CONTROL_OPCODES
from test_ptx_threads import PATTERNS

from ptx_simulator import instructions, memory_instructions  # noqa: F401  both fill the table
from ptx_simulator.build import simulate_ptx
from ptx_simulator.device import copy, empty, launch, load
from ptx_simulator.table import OPCODES

Types = tuple[list[str], str]  # of the operands, and of the result


def all_of(count: int) -> Callable[[str], Types]:
    """Return ``count`` operands and a result of the opcode's type."""
    return lambda opcode: ([opcode.split(".")[-1]] * count, opcode.split(".")[-1])


def with_counts(typed: int, counts: int) -> Callable[[str], Types]:
    """Return operands of the opcode's type, then u32 ones."""
    return lambda opcode: ([opcode.split(".")[-1]] * typed + ["u32"] * counts, opcode.split(".")[-1])


def arithmetic_types(opcode: str) -> Types:
    return all_of(3 if opcode.startswith(("fma", "mad")) else 2)(opcode)


def division_types(opcode: str) -> Types:
    return all_of(2 if opcode.startswith("div") else 1)(opcode)


def unary_or_binary(opcode: str) -> Types:
    return all_of(1 if opcode.startswith(("neg", "abs", "not")) else 2)(opcode)


def multiplication_types(opcode: str) -> Types:
    operation, part, type_ = opcode.split(".")
    result = f"{type_[0]}{2 * int(type_[1:])}" if part == "wide" else type_
    return [type_, type_, *([result] if operation == "mad" else [])], result


def compared_types(result: str) -> Callable[[str], Types]:
    def types(opcode: str) -> Types:
        combined = {"and", "or", "xor"} & set(opcode.split("."))
        return [opcode.split(".")[-1]] * 2 + ["pred"] * len(combined), result

    return types


def conversion_types(opcode: str) -> Types:
    *_, target, source = opcode.split(".")
    return [source], target


class Family(NamedTuple):
    """Opcodes of one formula."""

    pattern: str
    types: Callable[[str], Types]
    formula: Formula


FLOAT = r"(f16|bf16|f32|f64|f16x2|bf16x2|f32x2)"
INTEGER = r"[us](16|32|64)"
FAMILIES = {
    "arithmetic": Family(
        rf"(add|sub|mul|fma|mad)(\.(r\w|ftz|sat|relu))*\.{FLOAT}", arithmetic_types, formulas.arithmetic
    ),
    "division": Family(r"(div|rcp|sqrt)\.r[nzmp](\.ftz)?\.f(32|64)", division_types, formulas.division),
    "extremum": Family(rf"(min|max)(\.(ftz|NaN))*\.{FLOAT}", all_of(2), formulas.extremum),
    "sign": Family(rf"(neg|abs)(\.ftz)?\.{FLOAT}", all_of(1), formulas.sign),
    "copysign": Family(rf"copysign\.{FLOAT}", all_of(2), formulas.copy_sign),
    "testp": Family(r"testp\.\w+\.f\d\d", lambda opcode: ([opcode[-3:]], "pred"), formulas.test_class),
    "integer": Family(rf"(add|sub|min|max|div|rem|neg|abs)\.{INTEGER}", unary_or_binary, formulas.integer_arithmetic),
    "multiplication": Family(rf"(mul|mad)\.(lo|hi|wide)\.{INTEGER}", multiplication_types, formulas.multiplication),
    "logic": Family(r"(and|or|xor|not)\.(pred|b\d\d)", unary_or_binary, formulas.bit_logic),
    "shift": Family(r"sh[lr]\.[bus]\d\d", with_counts(1, 1), formulas.shift),
    "funnel shift": Family(r"shf\.[lr]\.\w+\.b32", all_of(3), formulas.funnel_shift),
    "prmt": Family(r"prmt\.b32", all_of(3), formulas.permute),
    "bfe": Family(r"bfe\.[us]\d\d", with_counts(1, 2), formulas.extract_bits),
    "bfi": Family(r"bfi\.b\d\d", with_counts(2, 2), formulas.insert_bits),
    "count": Family(r"(popc|clz)\.b\d\d", lambda opcode: ([opcode[-3:]], "u32"), formulas.bit_count),
    "brev": Family(r"brev\.b\d\d", all_of(1), formulas.bit_count),
    "bfind": Family(r"bfind(\.shiftamt)?\.[us]\d\d", lambda opcode: ([opcode[-3:]], "u32"), formulas.leading_bit),
    "setp": Family(rf"setp\.(?!.*x2).*\.({FLOAT}|[bus]\d\d)", compared_types("predicates"), conversions.set_predicate),
    "setp of halves": Family(r"setp\..*x2", compared_types("predicates"), conversions.set_two_predicates),
    "set": Family(rf"set\..*\.({FLOAT}|[us]\d\d)", compared_types("u32"), conversions.set_value),
    "selp": Family(
        r"selp\.\w+", lambda opcode: ([opcode.split(".")[1]] * 2 + ["pred"], opcode.split(".")[1]), conversions.select
    ),
    "cvt": Family(r"cvt\.(?!.*x2).*", conversion_types, conversions.conversion),
    "cvt to halves": Family(r"cvt\..*x2\.f32", lambda opcode: (["f32", "f32"], "b32"), conversions.to_packed),
}
TABLES = (0x00, 0xFF, 0xF0, 0xCC, 0xAA, 0x96, 0xE8, 0x1B)  # of lop3
APPROXIMATIONS = r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div)\.(approx|full)(\.ftz)?\.\w+"


def opcodes_of(pattern: str) -> list[str]:
    return [opcode for opcode in OPCODES if re.fullmatch(pattern, opcode)]


def operand_count(opcode: str) -> int:
    return 2 if opcode.startswith("div") else 1


# ---- PTX

VALUE_KERNEL = """
.visible .entry {name}(.param .u64 {name}_in, .param .u64 {name}_out) {{
    .reg .pred %p<6>;
    .reg .b16 %h<6>;
    .reg .b32 %r<6>, %index, %i<4>;
    .reg .b64 %d<6>, %in, %out;
    ld.param.u64 %in, [{name}_in];
    ld.param.u64 %out, [{name}_out];
    mov.u32 %i0, %ctaid.x;
    mov.u32 %i1, %ntid.x;
    mov.u32 %i2, %tid.x;
    mad.lo.s32 %index, %i0, %i1, %i2;
    mad.wide.u32 %in, %index, 8, %in;
    mad.wide.u32 %out, %index, 8, %out;
{body}
    ret;
}}
"""


class Group(NamedTuple):
    """Opcodes with the same types, which one kernel runs on the same operands."""

    name: str
    types: tuple[str, ...]
    result: str
    opcodes: list[str]

    def ptx(self) -> str:
        lines = []
        for number, type_ in enumerate(self.types, 1):
            offset = (number - 1) * CASES * 8
            if type_ == "pred":
                lines += [f"ld.global.u32 %i3, [%in+{offset}];", f"setp.ne.u32 %p{number}, %i3, 0;"]
            else:
                lines.append(f"ld.global.b{width(type_)} {register(type_, number)}, [%in+{offset}];")
        sources = ", ".join(register(type_, number) for number, type_ in enumerate(self.types, 1))
        for number, opcode in enumerate(self.opcodes):
            target = "%p0|%p5" if self.result == "predicates" else register(self.result, 0)
            opcode, _, table = opcode.partition(" ")
            lines.append(f"{opcode} {target}, {sources}{table and ', ' + table};")
            stored = target
            if self.result in ("pred", "predicates"):
                lines.append("selp.u32 %r0, 1, 0, %p0;")
                stored = "%r0"
            if self.result == "predicates":
                lines += ["selp.u32 %r5, 2, 0, %p5;", "or.b32 %r0, %r0, %r5;"]
            lines.append(f"st.global.b{width(self.result)} [%out+{number * CASES * 8}], {stored};")
        return VALUE_KERNEL.format(name=self.name, body="\n".join(f"    {line}" for line in lines))


def grouped() -> dict[str, list[Group]]:
    """Return the kernels of each family."""
    signatures: dict[str, Callable[[str], Types]] = {name: family.types for name, family in FAMILIES.items()}
    patterns = {name: family.pattern for name, family in FAMILIES.items()} | {"approximation": APPROXIMATIONS}
    signatures["approximation"] = lambda opcode: all_of(operand_count(opcode))(opcode)
    result = {}
    for number, (name, pattern) in enumerate(patterns.items()):
        by_types: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for opcode in opcodes_of(pattern):
            types, target = signatures[name](opcode)
            by_types.setdefault((tuple(types), target), []).append(opcode)
        groups = [Group(f"kernel_{number}_{n}", *key, found) for n, (key, found) in enumerate(by_types.items())]
        result[name] = groups
    result["lop3"] = [Group("kernel_lop3", ("b32",) * 3, "b32", [f"lop3.b32 {table:#x}" for table in TABLES])]
    return result


GROUPS = grouped()
Results = Callable[[Group], dict[str, list[int]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return a function that runs a group's kernel and returns the bits of each opcode's results."""
    text = HEAD + "".join(group.ptx() for groups in GROUPS.values() for group in groups)
    library = load(simulate_ptx(text, build_folder(tmp_path_factory) / "instructions.so"))

    def run(group: Group) -> dict[str, list[int]]:
        source = copy(np.array(operands(group.types), np.uint64).T)
        out = empty((len(group.opcodes), CASES), np.uint64)
        out[...] = 0
        launch(library, group.name, (4, 1, 1), (CASES // 4, 1, 1), [source, out])
        return dict(zip(group.opcodes, out.tolist(), strict=True))

    return run


def is_nan(type_: str, code: int) -> bool:
    return type_ in FORMATS and code & ~FORMATS[type_].sign > FORMATS[type_].infinity


def same(type_: str, found: int, expected: int) -> bool:
    """Return whether the bits are equal or both NaN; packed types are compared by halves."""
    if type_ in PACKED:
        bits = bits_of(PACKED[type_])
        pairs = [(code >> bits, code % (1 << bits)) for code in (found, expected)]
        return all(same(PACKED[type_], a, b) for a, b in zip(*pairs, strict=True))
    return found == expected or (is_nan(type_, found) and is_nan(type_, expected))


def in_register(type_: str, code: int) -> int:
    """Extend the sign of a signed result into a wider register."""
    return formulas.signed(code, bits_of(type_)) % (1 << width(type_)) if type_[0] == "s" else code


@pytest.mark.parametrize("name", FAMILIES)
def test_instructions(name: str, results: Results) -> None:
    wrong = []
    for group in GROUPS[name]:
        cases = operands(group.types)
        compared = group.result
        for opcode, found in results(group).items():
            halves = re.search(r"(b?f16x2)\.f32", opcode)
            compared = halves[1] if halves else group.result
            for case, code in zip(cases, found, strict=True):
                expected = in_register(group.result, FAMILIES[name].formula(opcode, case))
                if not same(compared, code, expected):
                    wrong.append(f"{opcode} {[hex(value) for value in case]}: {code:#x}, expected {expected:#x}")
                    break
    assert wrong == []


def to_float(type_: str, code: int) -> float:
    value = formulas.decode(FORMATS[type_], code)
    return -0.0 if value == 0 and code & FORMATS[type_].sign else float(value)


def approximation_error(opcode: str, case: Sequence[int], found: int) -> str | None:
    """Say what is wrong with the result of an approximation."""
    type_ = opcode.split(".")[-1]
    format = FORMATS[type_]
    flushed = [formulas.flush(format, code) if "ftz" in opcode else code for code in case]
    values = [to_float(type_, code) for code in flushed]
    if opcode.startswith("div.approx") and 2.0**126 < abs(values[1]) < math.inf:
        values = [
            values[0] if math.isnan(values[0]) or math.isinf(values[0]) else math.copysign(0, values[0]),
            values[1],
        ]
        values[0] = math.nan if math.isinf(values[0]) else values[0]
    exact = conversions.exact_value(opcode.split(".")[0], values)
    result = to_float(type_, found)
    rounded = to_float(
        type_, finish(opcode, formulas.encode(format, exact if not math.isfinite(exact) else formulas.Fraction(exact)))
    )
    if rounded == exact or not math.isfinite(rounded):
        return None if result == rounded or (result != result and rounded != rounded) else f"expected {rounded}"
    smallest = 2.0 ** (1 - format.bias)
    if "ftz" in opcode and abs(exact) < smallest and result == 0:
        return None
    allowed = max(
        conversions.largest_error(opcode, exact, values[0]), operand_count(opcode) * smallest / 2**format.fraction_bits
    )
    return None if abs(result - exact) <= allowed else f"expected {exact} within {allowed}"


def finish(opcode: str, code: int) -> int:
    return formulas.finish(FORMATS[opcode.split(".")[-1]], opcode.split("."), code)


def test_approximations(results: Results) -> None:
    """Check the PTX ISA's error limit, errors of that order, and exact results for numbers of the type."""
    wrong, inexact = [], dict.fromkeys(opcodes_of(APPROXIMATIONS), 0)
    for group in GROUPS["approximation"]:
        for opcode, found in results(group).items():
            element = PACKED.get(group.result, group.result)
            scalar = f"{opcode.rpartition('.')[0]}.{element}"
            bits = bits_of(element)
            for case, code in zip(operands(group.types), found, strict=True):
                for shift in (0, bits) if group.result in PACKED else (0,):
                    part = [value >> shift & ((1 << bits) - 1) for value in case]
                    result = code >> shift & ((1 << bits) - 1)
                    problem = approximation_error(scalar, part, result)
                    if problem:
                        wrong.append(
                            f"{opcode} {[hex(value) for value in part]}: {to_float(element, result)}, {problem}"
                        )
                    value = conversions.exact_value(opcode.split(".")[0], [to_float(element, item) for item in part])
                    if math.isfinite(value):
                        inexact[opcode] += result != formulas.encode(FORMATS[element], formulas.Fraction(value))
    assert wrong == []
    assert all(count > CASES // 16 for count in inexact.values()), inexact


def test_every_opcode_of_the_table_is_tested() -> None:
    patterns = [*(family.pattern for family in FAMILIES.values()), *PATTERNS.values(), APPROXIMATIONS, r"lop3\.b32"]
    for opcode in OPCODES:
        found = [pattern for pattern in patterns if re.fullmatch(pattern, opcode)]
        assert len(found) + (opcode in CONTROL_OPCODES) == 1, f"{opcode} is tested by {found}"
    assert set(CONTROL_OPCODES) <= set(OPCODES)


def test_a_new_opcode_without_a_test_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPCODES, "fns.b32", lambda instruction: instruction.set("0"))
    with pytest.raises(AssertionError, match=r"fns\.b32 is tested by \[\]"):
        test_every_opcode_of_the_table_is_tested()


def test_logic_of_three(results: Results) -> None:
    """Check lop3, which takes its table as a constant: bit i is the result for the bits of i."""
    (group,) = GROUPS["lop3"]
    for (opcode, found), table in zip(results(group).items(), TABLES, strict=True):
        for (a, b, c), code in zip(operands(group.types), found, strict=True):
            bits = [table >> (4 * (a >> n & 1) + 2 * (b >> n & 1) + (c >> n & 1)) & 1 for n in range(32)]
            assert code == sum(bit << n for n, bit in enumerate(bits)), (opcode, hex(a), hex(b), hex(c))


def test_formats_are_ieee() -> None:
    """Compare the formulas' own encoding and decoding with Python's."""
    for value in (0.1, 1e-310, -3.5, 1e300, 2.0**-1074, math.pi):
        assert (
            formulas.encode(FORMATS["f64"], formulas.Fraction(value))
            == struct.unpack("<Q", struct.pack("<d", value))[0]
        )
        with np.errstate(over="ignore"):
            assert formulas.encode(FORMATS["f32"], formulas.Fraction(value)) == int(np.float32(value).view(np.uint32))
            assert formulas.encode(FORMATS["f16"], formulas.Fraction(value)) == int(np.float16(value).view(np.uint16))
