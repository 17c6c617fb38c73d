"""Instructions that compute: arithmetic, logic, comparison and conversion."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .operands import BIT_TYPES, BITS, DIRECTIONS, FLOATS, PACKED, TYPES, Instruction
from .table import opcodes

ROUNDINGS = "{,.rn,.rz,.rm,.rp}"
UNSIGNED = "{.u16,.u32,.u64}"
SIGNED = "{.s16,.s32,.s64}"
INTEGERS = "{.u16,.u32,.u64,.s16,.s32,.s64}"
UNTYPED = "{.b16,.b32,.b64}"


def choice(names: Iterable[str]) -> str:
    return "{" + ",".join(f".{name}" for name in names) + "}"


def finish(i: Instruction, result: str) -> str:
    """Apply .ftz, .relu and .sat if the opcode has them."""
    for modifier, wrapper in (("ftz", "flush_subnormal"), ("relu", "rectify"), ("sat", "saturate")):
        if i.has(modifier):
            result = f"{wrapper}({result})"
    return result


# ---- floating point


def floating(i: Instruction, function: str) -> str:
    """Call ``function`` on the operands, or on both halves of packed ones."""

    def call(values: Iterable[str]) -> str:
        values = [f"flush_subnormal({value})" if i.has("ftz") else value for value in values]
        return finish(i, f"{function}({', '.join(values)})")

    if i.type not in PACKED:
        return i.set(call(i.values()))
    names = "abc"[: len(i.operands) - 1]
    element = PACKED[i.type]
    parameters = ", ".join(f"{element} {name}" for name in names)
    return i.set(f"packed<{element}>([]({parameters}) {{ return {call(names)}; }}, {', '.join(i.values())})")


OPERATORS = {"add": "+", "sub": "-", "mul": "*"}


def plain_arithmetic(i: Instruction) -> str:
    """Return the operation of C++ on float or double, which rounds to the nearest."""
    values = i.values()
    if i.parts[0] in OPERATORS:
        return f"({values[0]} {OPERATORS[i.parts[0]]} {values[1]})"
    return f"__builtin_fma{'f' if i.c_type == 'f32' else ''}({', '.join(values)})"


ARITHMETIC = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "fma": "fused_multiply_add",
    "mad": "fused_multiply_add",
}


@opcodes(
    f"{{add,sub,mul}}{ROUNDINGS}{{,.ftz}}{{,.sat}}.f32",
    f"{{add,sub,mul}}{ROUNDINGS}.f64",
    "{add,sub,mul}{,.rn}{,.ftz}{,.sat}{.f16,.f16x2}",
    "{add,sub,mul}{,.rn}{.bf16,.bf16x2}",
    "{add,mul}{,.rn}{,.ftz}.f32x2",
    "{fma,mad}{.rn,.rz,.rm,.rp}{,.ftz}{,.sat}.f32",
    "{fma,mad}{.rn,.rz,.rm,.rp}.f64",
    "fma.rn{,.ftz}{,.sat,.relu}{.f16,.f16x2}",
    "fma.rn{,.relu}{.bf16,.bf16x2}",
    "fma.rn{,.ftz}.f32x2",
)
def arithmetic(i: Instruction) -> str:
    if i.c_type in FLOATS and i.direction == "FE_TONEAREST" and not i.has("ftz", "sat"):
        return i.set(plain_arithmetic(i), i.c_type)
    return floating(i, f"{ARITHMETIC[i.parts[0]]}<{i.direction}>")


@opcodes("{min,max}{,.ftz}{,.NaN}{.f32,.f16,.f16x2}", "{min,max}{,.NaN}{.bf16,.bf16x2}", "{min,max}.f64")
def extremum(i: Instruction) -> str:
    return floating(i, {"min": "minimum", "max": "maximum"}[i.parts[0]] + ("_or_nan" if i.has("NaN") else ""))


@opcodes("{neg,abs}{,.ftz}{.f32,.f16,.f16x2}", "{neg,abs}{.bf16,.bf16x2,.f64}")
def sign(i: Instruction) -> str:
    return floating(i, {"neg": "negate", "abs": "absolute"}[i.parts[0]])


@opcodes("copysign{.f32,.f64}")
def copy_sign(i: Instruction) -> str:
    return floating(i, "copy_sign")


@opcodes("div{.rn,.rz,.rm,.rp}{,.ftz}.f32", "div{.rn,.rz,.rm,.rp}.f64")
def divide(i: Instruction) -> str:
    return floating(i, f"divide<{i.direction}>")


@opcodes("rcp{.rn,.rz,.rm,.rp}{,.ftz}.f32", "rcp{.rn,.rz,.rm,.rp}.f64")
def reciprocal(i: Instruction) -> str:
    return floating(i, f"[]({i.c_type} a) {{ return divide<{i.direction}>({i.c_type}(1), a); }}")


@opcodes("sqrt{.rn,.rz,.rm,.rp}{,.ftz}.f32", "sqrt{.rn,.rz,.rm,.rp}.f64")
def square_root(i: Instruction) -> str:
    return floating(i, f"square_root<{i.direction}>")


APPROXIMATIONS = {
    "ex2": "exp2_approximate",
    "lg2": "log2_approximate",
    "rcp": "reciprocal_approximate",
    "rsqrt": "rsqrt_approximate",
    "sqrt": "sqrt_approximate",
    "sin": "sine_approximate",
    "cos": "cosine_approximate",
    "tanh": "tanh_approximate",
    "div": "divide_approximate",
}


@opcodes(
    "{ex2,lg2,rcp,rsqrt,sqrt,sin,cos,div}.approx{,.ftz}.f32",
    "ex2.approx{.f16,.f16x2}",
    "ex2.approx.ftz{.bf16,.bf16x2}",
    "tanh.approx{.f32,.f16,.bf16,.f16x2,.bf16x2}",
)
def approximation(i: Instruction) -> str:
    return floating(i, APPROXIMATIONS[i.parts[0]])


@opcodes("div.full{,.ftz}.f32")
def divide_full(i: Instruction) -> str:
    return floating(i, "divide_full")


CLASSES = {
    "finite": "std::isfinite(a)",
    "infinite": "std::isinf(a)",
    "number": "!std::isnan(a)",
    "notanumber": "std::isnan(a)",
    "normal": "std::isnormal(a)",
    "subnormal": "std::fpclassify(a) == FP_SUBNORMAL",
}


@opcodes(f"testp{{{','.join('.' + name for name in CLASSES)}}}{{.f32,.f64}}")
def test_class(i: Instruction) -> str:
    return i.set(f"[]({i.c_type} a) {{ return {CLASSES[i.parts[1]]}; }}({i.value(1)})")


# ---- integers


def wrapped(c_type: str, a: str, operator: str, b: str) -> str:
    """Return an operation of integers that wraps, as unsigned ones do."""
    return f"{c_type}(u64({a}) {operator} u64({b}))"


@opcodes(f"{{add,sub}}{INTEGERS}", f"{{min,max}}{INTEGERS}", f"{{div,rem}}{INTEGERS}", f"{{neg,abs}}{SIGNED}")
def integer(i: Instruction) -> str:
    if i.parts[0] in ("add", "sub"):
        return i.set(wrapped(i.c_type, i.value(1), OPERATORS[i.parts[0]], i.value(2)), i.c_type)
    names = {"add": "add", "sub": "subtract", "min": "minimum", "max": "maximum", "div": "divide", "rem": "remainder"}
    names |= {"neg": "negate", "abs": "absolute"}
    return i.set(f"{names[i.parts[0]]}<{i.c_type}>({', '.join(i.values())})")


@opcodes(f"{{mul,mad}}{{.lo,.hi}}{INTEGERS}", "{mul,mad}.wide{.u16,.u32,.s16,.s32}")
def multiply(i: Instruction) -> str:
    result = i.c_type
    if i.has("wide"):
        result = f"{i.c_type[0]}{int(i.c_type[1:]) * 2}"
        product = f"multiply_wide<{result}>({i.value(1)}, {i.value(2)})"
    elif i.has("lo"):
        product = wrapped(result, i.value(1), "*", i.value(2))
    else:
        product = f"multiply_high<{result}>({i.value(1)}, {i.value(2)})"
    return i.set(wrapped(result, product, "+", i.value(3, result)) if i.parts[0] == "mad" else product, result)


@opcodes("{and,or,xor}{.pred,.b16,.b32,.b64}")
def bitwise(i: Instruction) -> str:
    return i.set(
        f"{i.c_type}({i.value(1)} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[i.parts[0]]} {i.value(2)})",
        i.c_type,
    )


@opcodes("not{.pred,.b16,.b32,.b64}")
def complement(i: Instruction) -> str:
    return i.set(f"{i.c_type}({'!' if i.type == 'pred' else '~'}{i.value(1)})")


@opcodes(f"shl{UNTYPED}", f"shr{UNTYPED}", f"shr{INTEGERS}")
def shift(i: Instruction) -> str:
    count = i.operands[2]
    if count.isdecimal() and int(count) < BITS[i.c_type] and i.c_type[0] == "u":
        operator = "<<" if i.parts[0] == "shl" else ">>"
        return i.set(f"{i.c_type}({i.value(1)} {operator} {int(count)})", i.c_type)
    return i.set(f"shift_{'left' if i.parts[0] == 'shl' else 'right'}<{i.c_type}>({i.value(1)}, {i.value(2, 'u32')})")


@opcodes("shf{.l,.r}{.wrap,.clamp}.b32")
def funnel_shift(i: Instruction) -> str:
    return i.set(f"funnel_{'left' if i.has('l') else 'right'}({', '.join(i.values())}, {str(i.has('clamp')).lower()})")


@opcodes("prmt.b32")
def permute(i: Instruction) -> str:
    return i.set(f"permute_bytes({', '.join(i.values())})")


@opcodes("lop3.b32")
def logic3(i: Instruction) -> str:
    return i.set(f"logic3<u32>({', '.join(i.values())})")


@opcodes("bfe{.u32,.s32,.u64,.s64}")
def extract(i: Instruction) -> str:
    return i.set(f"extract_bits<{i.c_type}>({i.value(1)}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")


@opcodes("bfi{.b32,.b64}")
def insert(i: Instruction) -> str:
    return i.set(f"insert_bits<{i.c_type}>({i.value(1)}, {i.value(2)}, {i.value(3, 'u32')}, {i.value(4, 'u32')})")


@opcodes("{popc,clz,brev}{.b32,.b64}")
def count(i: Instruction) -> str:
    return i.set(
        {"popc": "std::popcount", "clz": "std::countl_zero", "brev": "reverse_bits"}[i.parts[0]] + f"({i.value(1)})"
    )


@opcodes("bfind{,.shiftamt}{.u32,.s32,.u64,.s64}")
def find_leading(i: Instruction) -> str:
    return i.set(f"find_leading_bit<{i.c_type}>({i.value(1)}, {str(i.has('shiftamt')).lower()})")


# ---- comparison and selection

COMPARISONS = {"eq": "a == b", "ne": "a < b || a > b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"}
UNSIGNED_COMPARISONS = {"lo": "a < b", "ls": "a <= b", "hi": "a > b", "hs": "a >= b"}
# also true if one is a NaN
UNORDERED_COMPARISONS = {
    "equ": "!(a < b || a > b)",
    "neu": "!(a == b)",
    "ltu": "!(a >= b)",
    "leu": "!(a > b)",
    "gtu": "!(a <= b)",
    "geu": "!(a < b)",
    "num": "a == a && b == b",
    "nan": "a != a || b != b",
}
ALL_COMPARISONS = {**COMPARISONS, **UNSIGNED_COMPARISONS, **UNORDERED_COMPARISONS}


COMPARED = [
    f"{{.eq,.ne}}COMBINED{UNTYPED}",
    f"{choice(COMPARISONS)}COMBINED{INTEGERS}",
    f"{choice(UNSIGNED_COMPARISONS)}COMBINED{UNSIGNED}",
    f"{choice({**COMPARISONS, **UNORDERED_COMPARISONS})}COMBINED{{.f32,.ftz.f32,.f64,.f16,.bf16}}",
]


def comparison(i: Instruction) -> str:
    values = [f"flush_subnormal({value})" if i.has("ftz") else value for value in (i.value(1), i.value(2))]
    if i.c_type in BIT_TYPES and not i.has("ftz"):
        names = dict(zip("ab", values, strict=True))
        return f"({re.sub(r'[ab]', lambda name: names[name[0]], ALL_COMPARISONS[i.parts[1]])})"
    return f"[]({i.c_type} a, {i.c_type} b) {{ return {ALL_COMPARISONS[i.parts[1]]}; }}({', '.join(values)})"


@opcodes(*("setp" + form.replace("COMBINED", "{,.and,.or,.xor}") for form in COMPARED))
def set_predicate(i: Instruction) -> str:
    result, combined = comparison(i), ""
    for word, operator in (("and", "&&"), ("or", "||"), ("xor", "!=")):
        if i.has(word):
            combined = f" {operator} {i.value(3, 'pred')}"
    first, _, second = (name.strip() for name in i.operands[0].partition("|"))
    if not combined and not second:
        return i.write(first, result, "bool")
    statements = [f"const bool holds = {result};", i.write(first, f"holds{combined}", "bool")]
    if second:
        statements.insert(1, f"const bool other = !holds{combined};")
        statements.append(i.write(second, "other", "bool"))
    return " ".join(statements)


@opcodes(f"setp{choice({**COMPARISONS, **UNORDERED_COMPARISONS})}{{,.ftz}}.f16x2")
@opcodes(f"setp{choice({**COMPARISONS, **UNORDERED_COMPARISONS})}.bf16x2")
def set_two_predicates(i: Instruction) -> str:
    element, (low, high) = PACKED[i.type], i.operands[0].split("|")
    flushed = "flush_subnormal" if i.has("ftz") else ""
    holds = f"const auto holds = []({element} a, {element} b) {{ return {ALL_COMPARISONS[i.parts[1]]}; }};"
    halves = [
        [f"{flushed}(as<{element}>(u16({value} >> {bits})))" for value in (i.value(1), i.value(2))] for bits in (0, 16)
    ]
    results = [f"const bool result_{n} = holds({a}, {b});" for n, (a, b) in enumerate(halves)]
    writes = [i.write(target.strip(), f"result_{n}") for n, target in enumerate((low, high))]
    return " ".join((holds, *results, *writes))


@opcodes(*(f"set{form.replace('COMBINED', '{.u32,.s32,.f32}')}" for form in COMPARED[1:3]))
@opcodes(f"set{choice({**COMPARISONS, **UNORDERED_COMPARISONS})}{{,.ftz}}{{.u32,.s32,.f32}}.f32")
def set_value(i: Instruction) -> str:
    result = i.parts[-2]
    return i.set(f"({comparison(i)}) ? {'raw(1.0f)' if result == 'f32' else '~0u'} : 0u")


@opcodes(f"selp{UNTYPED}", f"selp{INTEGERS}", "selp{.f32,.f64}")
def select(i: Instruction) -> str:
    bits = BITS[i.c_type]  # the same bits, whatever the type
    return i.set(f"{i.value(3, 'pred')} ? {i.value(1, f'b{bits}')} : {i.value(2, f'b{bits}')}", f"u{bits}")


# ---- conversion

CONVERTED = "{.u8,.u16,.u32,.u64,.s8,.s16,.s32,.s64}"
WHOLE = {f"{name}i": direction for name, direction in DIRECTIONS.items()}


def source_and_target(i: Instruction) -> tuple[str, str]:
    target, source = [part for part in i.parts if part in TYPES]
    value = i.value(1, source)
    return f"flush_subnormal({value})" if i.has("ftz") and source == "f32" else value, TYPES[target]


@opcodes(f"cvt{{,.sat}}{CONVERTED}{CONVERTED}")
def integer_to_integer(i: Instruction) -> str:
    value, target = source_and_target(i)
    return i.set(f"convert_saturating<{target}>({value})" if i.has("sat") else f"{target}({value})", target)


@opcodes(f"cvt{{.rn,.rz,.rm,.rp}}{{.f32,.f64}}{CONVERTED}")
def integer_to_float(i: Instruction) -> str:
    value, target = source_and_target(i)
    return i.set(f"convert_to_float<{i.direction}, {target}>({value})")


@opcodes(f"cvt{choice(WHOLE)}{CONVERTED}{{.f16,.bf16,.f32,.f64}}", f"cvt{choice(WHOLE)}.ftz{CONVERTED}.f32")
def float_to_integer(i: Instruction) -> str:
    value, target = source_and_target(i)
    return i.set(f"convert_to_integer<{WHOLE[i.parts[1]]}, {target}>({value})")


@opcodes(f"cvt{choice(WHOLE)}{{,.ftz}}{{,.sat}}.f32.f32", f"cvt{choice(WHOLE)}.f64.f64", f"cvt{choice(WHOLE)}.f16.f16")
def round_to_whole(i: Instruction) -> str:
    value, _ = source_and_target(i)
    return i.set(finish(i, f"round_to_integer({value}, {WHOLE[i.parts[1]]})"))


@opcodes("cvt{,.ftz}{,.sat}.f32.f32", "cvt{,.ftz}.f32.f16", "cvt{.f32.bf16,.f64.f32,.f64.f16,.f64.bf16}")
@opcodes("cvt{.rn,.rz,.rm,.rp}{,.ftz}{,.sat}.f32.f64")
def float_to_float(i: Instruction) -> str:
    value, target = source_and_target(i)
    source = [part for part in i.parts if part in TYPES][1]
    value = f"wide({value})" if source in ("f16", "bf16") else value
    result = f"convert_to_float<{i.direction}, {target}>({value})"
    return i.set(finish(i, result) if target == "f32" else result)


@opcodes("cvt{.rn,.rz}{,.relu}{.f16,.bf16}.f32", "cvt{.rn,.rz}.f16.f64")
def float_to_small(i: Instruction) -> str:
    value, target = source_and_target(i)
    return i.set(finish(i, f"{target}({value}, {str(i.has('rz')).lower()})"))


@opcodes(f"cvt.rn.f16{CONVERTED}", "cvt.rn.bf16{.u16,.u32,.s16,.s32}")
def integer_to_small(i: Instruction) -> str:
    value, target = source_and_target(i)
    return i.set(f"{target}(double({value}))")


@opcodes("cvt{.rn,.rz}{,.relu}{.f16x2,.bf16x2}.f32")
def float_to_packed(i: Instruction) -> str:
    element = PACKED[i.parts[-2]]
    halves = [finish(i, f"{element}({i.value(index, 'f32')}, {str(i.has('rz')).lower()})") for index in (1, 2)]
    return i.set(f"u32({halves[0]}.code) << 16 | {halves[1]}.code")
