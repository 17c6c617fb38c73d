"""Instructions of the simulator that branch, copy asynchronously, only order or hint.

The tests also cover the messages of failed launches.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_kernels import Run, operand, result, runner, words

from ptx_simulator import instructions, memory_instructions  # noqa: F401  both fill the table
from ptx_simulator.table import OPCODES

NO_EFFECT = [
    opcode
    for opcode in OPCODES
    if re.fullmatch(r"membar.*|fence.*|prefetchu?|nanosleep.*|griddepcontrol.*|createpolicy.*", opcode)
]
CONTROL = ["bra", "bra.uni", "brx.idx", "brx.idx.uni", "ret", "ret.uni", "exit", "trap"]
ASYNCHRONOUS = ["cp.async", "cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"]
CONTROL_OPCODES = [*NO_EFFECT, *CONTROL, *ASYNCHRONOUS]
BODIES: dict[str, str] = {}  # the bodies of all kernels, by test


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner("control", BODIES, tmp_path_factory)


ARGUMENTS = {"prefetch": " [%in]", "prefetchu": " [%in]", "nanosleep.u32": " 20"}
for opcode in NO_EFFECT:
    arguments = " %d1, 1.0" if opcode.startswith("createpolicy") else ARGUMENTS.get(opcode, "")
    BODIES[opcode] = f"{operand(0, 'b64')} {opcode}{arguments}; {result(0, 'b64')}"
COPIES = """mul.wide.u32 %d1, %index, 16; shl.b32 %r1, %index, 4; add.u32 %r1, %address, %r1;
    cp.async.{cache}.shared.global.L2::128B [%r1], [%in], {size}{source_size};
    ld.shared.b64 %d2, [%r1]; st.b64 [%out], %d2; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+512], [%in], 4; {wait}
    ld.shared.v2.b64 {{%d2, %d3}}, [%r1]; st.b64 [%out+8], %d2; st.b64 [%out+16], %d3;
    ld.shared.b32 %r2, [%r1+512]; st.b32 [%out+24], %r2;
    cp.async.wait_all;"""
# cache, bytes, available bytes, the wait, and the 32-bit words of the second copy available by then
COPY_FORMS = {
    "cp.async": ("cg", 16, 16, "cp.async.wait_all;", 1),
    "cp.async 8": ("ca", 8, 8, "cp.async.wait_group 0;", 0),
    "cp.async 4": ("ca", 4, 4, "cp.async.commit_group; cp.async.wait_group 1;", 0),
    "cp.async of less": ("cg", 16, 12, "cp.async.commit_group; cp.async.wait_group 0;", 1),
}
for name, (cache, size, available, wait, _) in COPY_FORMS.items():
    given = "" if available == size else f", {available}"
    BODIES[name] = COPIES.format(cache=cache, size=size, source_size=given, wait=wait)
END = {"exit": "exit", "ret.uni": "ret.uni", "ret": "ret"}
for name, statement in END.items():
    BODIES[name] = f"mov.b64 %d0, 1; {result(0, 'b64')} {statement}; mov.b64 %d0, 2; {result(0, 'b64')}"
BODIES["branches"] = f"""mov.u32 %r0, 0; mov.u32 %r1, %index;
    AGAIN: setp.eq.u32 %p1, %r1, 0; @%p1 bra OUT; add.u32 %r0, %r0, %r1; sub.u32 %r1, %r1, 1; bra.uni AGAIN;
    OUT: {result(0, "b32")}"""
for name in ("brx.idx", "brx.idx.uni"):
    BODIES[name] = f"""TARGETS: .branchtargets FIRST, SECOND, FIRST, THIRD;
    {operand(0, "b32")} {name} %r0, TARGETS;
    FIRST: mov.u32 %r1, 100; bra STORE; SECOND: mov.u32 %r1, 200; bra STORE; THIRD: mov.u32 %r1, 300;
    STORE: {result(0, "b32", "%r1")}"""
BODIES["trap"] = "setp.eq.u32 %p1, %index, 3; @%p1 trap;"
BODIES["scopes"] = (
    f"""{operand(0, "b32")} {{ .reg .b32 %r0; mov.u32 %r0, 7; {result(1, "b32", "%r0")} }} {result(0, "b32")}"""
)
BODIES["unsupported"] = (
    f"{operand(0, 'b32')} setp.ne.u32 %p1, %r0, 0; @%p1 fns.b32 %r1, %r0, %r0, %r0; {result(0, 'b32')}"
)
BODIES["misaligned"] = "ld.v2.b32 {%r0, %r1}, [%in+4];"
BODIES["lane left out"] = "shfl.sync.idx.b32 %r0, %lane, 0, 31, 0xfffe;"
BODIES["shared memory"] = f"ld.shared.b64 %d0, [%address+8]; {result(0, 'b64')} " + (
    ".local .align 8 .b8 scratch[64]; mov.b64 %d1, scratch; ld.local.b64 %d2, [%d1+32]; " + result(1, "b64", "%d2")
)


def test_hints_and_fences_change_nothing(run: Run) -> None:
    operands = words(2)
    for opcode in NO_EFFECT:
        assert run(opcode, operands)[:, 0].tolist() == [values[0] for values in operands], opcode


@pytest.mark.parametrize("name", COPY_FORMS)
def test_asynchronous_copies(name: str, run: Run) -> None:
    _, size, available, _, later = COPY_FORMS[name]
    operands = words(8)
    for values, out in zip(operands, run(name, operands), strict=True):
        memory = np.array(values, np.uint64).tobytes()
        assert out[:1].tobytes() == b"\xff" * 8  # nothing is there before the wait
        assert out[1:3].tobytes() == (memory[:available] + b"\0" * (size - available)).ljust(16, b"\xff")
        assert out[3:4].tobytes()[:4] == (memory[:4] if later else b"\xff" * 4)


def test_branches(run: Run) -> None:
    assert run("branches", words(9))[:, 0].astype(np.uint32).tolist() == [n * (n + 1) // 2 for n in range(9)]
    for name in ("brx.idx", "brx.idx.uni"):
        assert run(name, [[index] for index in range(4)])[:, 0].astype(np.uint32).tolist() == [100, 200, 100, 300]
        with pytest.raises(RuntimeError, match=r"brx\.idx beyond its targets"):
            run(name, [[4]])
    for name in END:
        assert run(name, words(2))[:, 0].tolist() == [1, 1]
    assert run("scopes", [[5]])[0, :2].astype(np.uint32).tolist() == [5, 7]


def test_memory_starts_as_nan(run: Run) -> None:
    assert run("shared memory", words(2))[:, :2].tolist() == [[2**64 - 1] * 2] * 2


FAILURES = {
    "trap": r"block \(0,0,0\) thread \(3,0,0\): control\.ptx:\d+: trap$",
    "unsupported": r"the simulator does not support: @%p1 fns\.b32 %r1, %r0, %r0, %r0 \(fns\.b32\)$",
    "misaligned": r"misaligned access of 8 bytes at address 0x",
    "lane left out": r"lane 0 calls shfl\.sync\.idx with mask 0x0000fffe, which leaves it out$",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_where_and_why(name: str, run: Run) -> None:
    with pytest.raises(RuntimeError, match=FAILURES[name]):
        run(name, [[1]] * 8 if name != "lane left out" else [[1]])
    if name == "unsupported":
        run(name, [[0]])  # an instruction that is not reached does no harm
