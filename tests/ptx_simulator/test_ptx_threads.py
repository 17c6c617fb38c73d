"""Every instruction of the simulator that moves data or communicates between threads."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
import ptx_formulas as formulas
import pytest
from ptx_formulas import FORMATS, PACKED
from ptx_kernels import LETTERS, SLOTS, Run, bits_of, low, operand, result, runner, width, words

from ptx_simulator import instructions, memory_instructions  # noqa: F401  both fill the table
from ptx_simulator.table import OPCODES, table_name

PATTERNS = {
    "mov": r"mov\.\w+",
    "cvta": r"cvta\..*",
    "ld": r"ld\..*",
    "st": r"st\..*",
    "atom": r"(atom|red)\..*",
    "shfl": r"shfl\..*",
    "vote": r"(vote|redux)\..*",
    "matrix": r"(ld|st)matrix\..*",
    "barrier": r"(bar|barrier)(\.cta)?\.sync.*",
    "arrive": r"(bar|barrier)(\.cta)?\.arrive.*",
    "barrier reduction": r"(bar|barrier)(\.cta)?\.red.*",
    "warp": r"bar\.warp\.sync",
}
BODIES: dict[str, str] = {}  # the bodies of all kernels, by test


def opcodes_of(name: str) -> list[str]:
    return [opcode for opcode in OPCODES if re.fullmatch(PATTERNS[name], opcode)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner("threads", BODIES, tmp_path_factory)


# ---- mov, cvta

for opcode in opcodes_of("mov"):
    type_ = opcode.split(".")[1]
    letter = "p" if type_ == "pred" else LETTERS[width(type_)]
    BODIES[opcode] = f"{operand(0, type_)} {opcode} %{letter}1, %{letter}0; {result(0, type_, f'%{letter}1')}"
for opcode in opcodes_of("cvta"):
    letter = LETTERS[width(opcode[-3:])]
    BODIES[opcode] = (
        f"{operand(0, opcode[-3:])} {opcode} %{letter}1, %{letter}0; {result(0, opcode[-3:], f'%{letter}1')}"
    )
BODIES["halves"] = f"""
    {operand(0, "b32")} mov.b32 {{%h0, %h1}}, %r0; mov.b32 %r1, {{%h1, %h0}}; {result(0, "b32", "%r1")}
    {operand(1, "b64")} mov.b64 {{%r2, %r3}}, %d1; mov.b64 %d2, {{%r3, %r2}}; {result(1, "b64", "%d2")}
    mov.b64 {{%h0, _, %h2, %h3}}, %d1; mov.b64 %d2, {{%h3, %h2, %h2, %h0}}; {result(2, "b64", "%d2")}
"""
SPECIAL = (
    "tid.y",
    "ntid.x",
    "ctaid.x",
    "nctaid.z",
    "warpid",
    "lanemask_eq",
    "lanemask_lt",
    "lanemask_le",
    "lanemask_gt",
    "lanemask_ge",
)
for special in SPECIAL:
    BODIES[special] = f"mov.u32 %r0, %{special}; {result(0, 'b32')}"


@pytest.mark.parametrize("name", ["mov", "cvta"])
def test_moves(name: str, run: Run) -> None:
    for opcode in opcodes_of(name):
        type_ = opcode.split(".")[-1]
        operands = words(4) + [[0] * SLOTS]
        for values, out in zip(operands, run(opcode, operands), strict=True):
            expected = low(values[0], 32) != 0 if type_ == "pred" else low(values[0], width(type_))
            assert low(out[0], 32 if type_ == "pred" else width(type_)) == expected, opcode


def test_registers_of_several_parts(run: Run) -> None:
    (out,) = run("halves", [[0x11112222, 0x1111222233334444]])
    assert [hex(value) for value in (low(out[0], 32), *map(int, out[1:3]))] == [
        "0x22221111",
        "0x3333444411112222",
        "0x4444222222221111",
    ]


def test_special_registers(run: Run) -> None:
    everyone = (1 << 32) - 1
    expected = {
        "tid.y": lambda thread: 0,
        "ntid.x": lambda thread: 64,
        "ctaid.x": lambda thread: 0,
        "nctaid.z": lambda thread: 1,
        "warpid": lambda thread: thread // 32,
        "lanemask_eq": lambda thread: 1 << thread % 32,
        "lanemask_lt": lambda thread: (1 << thread % 32) - 1,
        "lanemask_le": lambda thread: (2 << thread % 32) - 1,
        "lanemask_gt": lambda thread: everyone - (2 << thread % 32) + 1,
        "lanemask_ge": lambda thread: everyone - (1 << thread % 32) + 1,
    }
    for special in SPECIAL:
        found = run(special, words(64))[:, 0].astype(np.uint32).tolist()
        assert found == [expected[special](thread) for thread in range(64)], special


# ---- ld, st

QUALIFIED = {  # the cache and the kind of memory make no difference
    "ld.global.nc.L1::no_allocate.L2::128B.v4.f32": "ld.v4.f32",
    "ld.global.cs.v2.b64": "ld.v2.b64",
    "ld.weak.global.L1::evict_last.b16": "ld.b16",
    "ld.relaxed.gpu.global.u32": "ld.relaxed.u32",
    "ld.acquire.cta.b64": "ld.acquire.b64",
    "ld.volatile.global.f32": "ld.volatile.f32",
    "ld.const.lu.s16": "ld.s16",
    "st.global.cs.v4.u32": "st.v4.u32",
    "st.global.wt.b8": "st.b8",
    "st.release.sys.global.u64": "st.release.u64",
    "st.global.L1::no_allocate.v8.f32": "st.v8.f32",
}


def access(opcode: str) -> tuple[str, int]:
    """Return (type, elements) of a load or store."""
    vector = re.search(r"\.v(\d)\b", opcode)
    return opcode.split(".")[-1], int(vector[1]) if vector else 1


def vector_of(type_: str, count: int) -> str:
    names = ", ".join(f"%{LETTERS[width(type_)]}{n}" for n in range(count))
    return f"{{{names}}}" if count > 1 else names


for opcode in (*opcodes_of("ld"), *opcodes_of("st"), *QUALIFIED):
    type_, count = access(opcode)
    if opcode.startswith("ld"):
        body = f"{opcode} {vector_of(type_, count)}, [%in]; " + " ".join(result(n, type_) for n in range(count))
    else:
        body = " ".join(operand(n, type_) for n in range(count)) + f" {opcode} [%out+0], {vector_of(type_, count)};"
    BODIES[opcode] = body
BODIES["cache policy"] = (
    "createpolicy.fractional.L2::evict_last.b64 %d1, 1.0; ld.global.L2::cache_hint.b64 %d0, [%in], %d1; "
    + result(0, "b64")
)


@pytest.mark.parametrize("name", ["ld", "st"])
def test_memory(name: str, run: Run) -> None:
    assert all(table_name(opcode) == name for opcode, name in QUALIFIED.items())
    for opcode in (*opcodes_of(name), *(opcode for opcode in QUALIFIED if opcode.startswith(name))):
        type_, count = access(opcode)
        size = bits_of(type_) // 8
        operands = words(3)
        found = run(opcode, operands)
        for values, out in zip(operands, found, strict=True):
            if name == "st":
                expected = b"".join(low(value, 8 * size).to_bytes(size, "little") for value in values[:count])
                assert out.tobytes() == expected.ljust(8 * SLOTS, b"\xff"), opcode
                continue
            memory = np.array(values, np.uint64).tobytes()
            for n in range(count):
                element = int.from_bytes(memory[n * size : (n + 1) * size], "little", signed=type_[0] == "s")
                assert low(out[n], width(type_)) == low(element, width(type_)), opcode


def test_a_cache_policy_is_a_hint(run: Run) -> None:
    operands = words(2)
    assert run("cache policy", operands)[:, 0].tolist() == [values[0] for values in operands]


# ---- atom, red

for opcode in opcodes_of("atom"):
    type_ = opcode.split(".")[-1]
    sources = [f"%{LETTERS[width(type_)]}{n}" for n in (1, 2)][: 2 if ".cas." in opcode else 1]
    returned = f"%{LETTERS[width(type_)]}0"
    target = f"{returned}, " if opcode.startswith("atom") else ""
    # the operands lie behind the changed word
    BODIES[opcode] = (
        f"{operand(0, 'b64')} st.b64 [%out+8], %d0; {operand(1, type_)} "
        f"{operand(2, type_)} mov.b64 %d5, -1; mov.b32 %r0, -1; "
        f"{opcode} {target}[%out+8], {', '.join(sources)}; " + (result(0, type_, returned) if target else "")
    )


def updated(opcode: str, old: int, value: int, replacement: int) -> int:
    """Return the result of atom and red by formula."""
    name, type_ = opcode.split(".")[-2:]
    if name == "add" and (type_ in FORMATS or type_ in PACKED):
        return formulas.arithmetic(f"add.rn.{type_}", [old, value])
    bits = bits_of(type_)
    a, b = (formulas.integer(type_, code) for code in (old, value))
    simple = {"add": a + b, "min": min(a, b), "max": max(a, b), "and": a & b, "or": a | b, "xor": a ^ b, "exch": b}
    wrapping = {
        "inc": 0 if a >= b else a + 1,
        "dec": b if a == 0 or a > b else a - 1,
        "cas": replacement if a == b else a,
    }
    return (simple | wrapping)[name] % (1 << bits)


def test_atomics(run: Run) -> None:
    rng = random.Random(0)
    for opcode in opcodes_of("atom"):
        type_ = opcode.split(".")[-1]
        bits = bits_of(type_)
        operands = [[low(value, bits) for value in values] for values in words(24)]
        for values in operands[:12]:  # near each other, equal, 0
            values[0] = rng.choice([0, 1, values[1], (values[1] + 1) % (1 << bits), (1 << bits) - 1])
        for values, out in zip(operands, run(opcode, operands), strict=True):
            found, expected = low(out[1], bits), updated(opcode, *values[:3])
            format = FORMATS.get(PACKED.get(type_, type_))
            if format is not None and formulas.is_nan(format, expected, type_ in PACKED):
                continue
            assert found == expected, (opcode, [hex(value) for value in values[:3]])
            assert opcode.startswith("red") or low(out[0], bits) == values[0], opcode


# ---- within a warp

for opcode in opcodes_of("shfl"):
    BODIES[opcode] = f"""
        {operand(0, "b32")} {operand(1, "b32")} {operand(2, "b32")}
        {opcode} %r3|%p1, %r0, %r1, %r2, 0xffffffff; {result(0, "b32", "%r3")} {result(1, "pred")}
        {opcode} %r4, %r0, %r1, %r2, -1; {result(2, "b32", "%r4")}
    """
for opcode in opcodes_of("vote"):
    kind = opcode.split(".")[-1]
    source, target = ("%p1" if opcode.startswith("vote") else "%r1"), ("%p2" if kind == "pred" else "%r2")
    stored = result(0, "pred", "%p2") if kind == "pred" else result(0, "b32", "%r2")
    # a warp's first word is the mask of the participating lanes
    BODIES[opcode] = f"""
        {operand(0, "b32")} {operand(1, "pred")} {operand(1, "b32")} mov.u32 %r3, %lanemask_eq;
        and.b32 %r3, %r3, %r0; setp.eq.u32 %p3, %r3, 0; @%p3 bra DONE_{len(BODIES)};
        {opcode} {target}, {source}, %r0; {stored}
        DONE_{len(BODIES)}: bar.warp.sync -1;
    """


def shuffled(mode: str, values: Sequence[int], lane: int, b: int, c: int) -> tuple[int, bool]:
    """Return (value, whether the source is in range), by the pseudo-code of the PTX ISA."""
    b, clamp, mask = b & 31, c & 31, c >> 8 & 31
    most, least = lane & mask | clamp & ~mask, lane & mask
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~mask}[mode]
    valid = source >= most if mode == "up" else source <= most
    return values[source if valid else lane], valid


def test_shuffles(run: Run) -> None:
    for opcode in opcodes_of("shfl"):
        mode = opcode.split(".")[2]
        operands = words(32 * 16)
        for warp in range(16):
            distance, segment = (0, 1, 2, 5, 16, 31, 33, 7)[warp % 8], (0, 0x1000, 0x1800, 0x1C00)[warp % 4]
            for lane in range(32):
                operands[32 * warp + lane][1:3] = [distance, segment | (0 if mode == "up" else 31)]
        found = run(opcode, operands)
        for thread, out in enumerate(found):
            first = thread // 32 * 32
            values = [low(row[0], 32) for row in operands[first : first + 32]]
            value, valid = shuffled(mode, values, thread % 32, *operands[thread][1:3])
            assert (low(out[0], 32), low(out[1], 32), low(out[2], 32)) == (value, valid, value), (opcode, thread)


def test_votes_and_reductions(run: Run) -> None:
    masks = (2**32 - 1, 2**32 - 1, 2**32 - 1, 0xFF, 0x80000001, 0x0000FFF0, 1)
    for opcode in opcodes_of("vote"):
        base, _, name, type_ = opcode.split(".")
        operands = words(32 * len(masks))
        for thread, values in enumerate(operands):
            warp = thread // 32
            values[0] = masks[warp]
            if base == "vote":
                values[1] = warp if warp < 2 else values[1] & 1
        found = run(opcode, operands)
        for thread, out in enumerate(found):
            warp, lane = divmod(thread, 32)
            if not masks[warp] >> lane & 1:
                assert out[0] == 2**64 - 1, opcode
                continue
            lanes = [n for n in range(32) if masks[warp] >> n & 1]
            values = [low(operands[32 * warp + n][1], 32) for n in lanes]
            if base == "vote":
                votes = {"all": all(values), "any": any(values), "uni": len({bool(value) for value in values}) == 1}
                ballot = sum(1 << n for n, value in zip(lanes, values, strict=True) if value)
                expected = ballot if name == "ballot" else votes[name]
            else:
                expected = values[0]
                for value in values[1:]:
                    expected = updated(f"atom.{name}.{type_}", expected, value, 0)
            assert low(out[0], 32) == expected, (opcode, warp)


for opcode in opcodes_of("matrix"):
    count = int(opcode.split(".")[4][1:])
    registers = "{" + ", ".join(f"%r{n}" for n in range(4, 4 + count)) + "}"
    outputs = " ".join(result(n, "b32", f"%r{4 + n}") for n in range(count))
    rows = "shl.b32 %r0, %lane, 4; xor.b32 %r1, %r0, 48; add.u32 %r0, %address, %r0; add.u32 %r1, %address, %r1;"
    if opcode.startswith("ld"):  # lane l writes row l, and names row l ^ 3
        BODIES[
            opcode
        ] = f"""{rows} ld.v4.b32 {{%r4, %r5, %r6, %r7}}, [%in]; st.shared.v4.b32 [%r0], {{%r4, %r5, %r6, %r7}};
            bar.warp.sync -1; {opcode} {registers}, [%r1]; {outputs}"""
    else:
        BODIES[opcode] = f"""{rows} ld.v4.b32 {{%r4, %r5, %r6, %r7}}, [%in]; {opcode} [%r1], {registers};
            bar.warp.sync -1; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r0];
            st.v4.b32 [%out], {{%r4, %r5, %r6, %r7}};"""


def test_matrices(run: Run) -> None:
    operands = np.array(words(32), np.uint64)
    halves = operands.view(np.uint16).reshape(32, -1)
    lanes = np.arange(32)
    for opcode in opcodes_of("matrix"):
        count, transposed = int(opcode.split(".")[4][1:]), ".trans." in opcode
        found = run(opcode, operands).view(np.uint16).reshape(32, -1)
        for m in range(count):
            for half in range(2):
                row, column = lanes // 4, lanes % 4 * 2 + half
                row, column = (column, row) if transposed else (row, column)
                if opcode.startswith("ld"):
                    assert (found[lanes, 4 * m + half] == halves[(8 * m + row) ^ 3, column]).all(), opcode
                else:
                    assert (found[(8 * m + row) ^ 3, column] == halves[lanes, 2 * m + half]).all(), opcode


# ---- barriers, which order shared memory

EXCHANGE = """{before} shl.b32 %r1, %index, 2; add.u32 %r1, %address, %r1; st.shared.b32 [%r1], %index;
    {barrier}
    xor.b32 %r2, %index, {partner}; shl.b32 %r2, %r2, 2; add.u32 %r2, %address, %r2;
    ld.shared.b32 %r3, [%r2]; """ + result(0, "b32", "%r3")
for opcode in opcodes_of("barrier"):
    BODIES[opcode] = EXCHANGE.format(before="", barrier=f"{opcode} 0;", partner=63)
    # two pairs of warps, each with its own barrier
    numbered = f"shr.u32 %r4, %index, 6; add.u32 %r4, %r4, 3; {opcode} %r4, 64;"
    BODIES[f"{opcode} numbered"] = EXCHANGE.format(before="", barrier=numbered, partner=63)
for opcode in opcodes_of("arrive"):
    waiting = opcode.replace("arrive", "sync")
    end = f"END_{len(BODIES)}"
    barrier = f"@%p1 {opcode} 1, 64; @%p1 bra {end}; {waiting} 1, 64;"
    exchange = EXCHANGE.format(before="setp.lt.u32 %p1, %index, 32;", barrier=barrier, partner=63)
    BODIES[opcode] = exchange + f"{end}: bar.warp.sync -1;"
for opcode in opcodes_of("barrier reduction"):
    target, stored = ("%p2", result(0, "pred", "%p2")) if opcode.endswith("pred") else ("%r2", result(0, "b32", "%r2"))
    again = stored.replace("[%out+0]", "[%out+8]")
    BODIES[opcode] = f"{operand(1, 'pred')} {opcode} {target}, 0, %p1; {stored} {opcode} {target}, 2, 96, !%p1; {again}"
BODIES["bar.warp.sync"] = EXCHANGE.format(before="", barrier="bar.warp.sync 0xffffffff;", partner=31)


def test_barriers(run: Run) -> None:
    tests = [*opcodes_of("barrier"), *(f"{opcode} numbered" for opcode in opcodes_of("barrier")), "bar.warp.sync"]
    for test in tests:
        for seed in range(3):
            found = run(test, words(128), seed)[:, 0].astype(np.uint32).tolist()
            assert found == [thread ^ (31 if test == "bar.warp.sync" else 63) for thread in range(128)], test


def test_arrivals_wait_for_nobody(run: Run) -> None:
    for opcode in opcodes_of("arrive"):
        for seed in range(3):
            found = run(opcode, words(64), seed)[:, 0].astype(np.uint32).tolist()
            assert found[32:] == [thread ^ 63 for thread in range(32, 64)], opcode


def test_barriers_that_reduce(run: Run) -> None:
    for opcode in opcodes_of("barrier reduction"):
        for votes in ([0] * 96, [1] * 96, [1] * 95 + [0], [0] * 50 + [1] + [0] * 45):
            operands = [[0, vote] for vote in votes]
            found = run(opcode, operands)
            expected = {"and": lambda values: int(all(values)), "or": lambda values: int(any(values)), "popc": sum}
            reduce = next(function for name, function in expected.items() if f".{name}" in opcode)
            assert set(found[:, 0].astype(np.uint32).tolist()) == {reduce(votes)}, opcode
            assert set(found[:, 1].astype(np.uint32).tolist()) == {reduce([1 - vote for vote in votes])}, opcode
