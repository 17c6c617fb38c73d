"""Small kernels written in PTX for tests of single instructions.

Each has its own body. One library has all of them, and one launch runs a kernel.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_formulas import FORMATS, PACKED

from ptx_simulator.build import COMPILER, simulate_ptx
from ptx_simulator.device import copy, launch, load

SLOTS = 8  # of 64 bits, for each thread's operands and results
LETTERS = {16: "h", 32: "r", 64: "d"}  # of registers, by their width
HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"
KERNEL = """
.visible .entry {name}(.param .u64 {name}_in, .param .u64 {name}_out) {{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<9>, %index, %lane, %address, %part;
    .reg .b64 %d<9>, %in, %out;
    .shared .align 16 .b8 {name}_memory[1024];
    ld.param.u64 %in, [{name}_in];
    ld.param.u64 %out, [{name}_out];
    mov.u32 %index, %tid.x;
    mov.u32 %lane, %laneid;
    mov.u32 %address, {name}_memory;
    mad.wide.u32 %in, %index, 64, %in;
    mad.wide.u32 %out, %index, 64, %out;
{body}
    ret;
}}
"""
Run = Callable[..., np.ndarray]


def bits_of(type_: str) -> int:
    if type_ in ("pred", "predicates"):
        return 32
    return (
        2 * FORMATS[PACKED[type_]].bits
        if type_ in PACKED
        else FORMATS[type_].bits
        if type_ in FORMATS
        else int(type_[1:])
    )


def width(type_: str) -> int:
    """Return the width of a register for a value of the type."""
    return max(16, bits_of(type_))


def register(type_: str, number: int) -> str:
    return f"%p{number}" if type_ in ("pred", "predicates") else f"%{LETTERS[width(type_)]}{number}"


def operand(number: int, type_: str) -> str:
    """Load operand ``number`` of a thread into the register of its type with that number."""
    if type_ == "pred":
        return f"ld.b32 %part, [%in+{8 * number}]; setp.ne.u32 %p{number}, %part, 0;"
    return f"ld.b{width(type_)} {register(type_, number)}, [%in+{8 * number}];"


def result(number: int, type_: str, source: str | None = None) -> str:
    """Store result ``number`` of a thread."""
    source = source or register(type_, number)
    if type_ == "pred":
        return f"selp.u32 %part, 1, 0, {source}; st.b32 [%out+{8 * number}], %part;"
    return f"st.b{width(type_)} [%out+{8 * number}], {source};"


def build_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all libraries of a test run, which share the simulator's runtime."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    folder = factory.getbasetemp() / "ptx_simulator"
    folder.mkdir(exist_ok=True)
    return folder


def runner(name: str, bodies: dict[str, str], factory: pytest.TempPathFactory) -> Run:
    """Build the kernels, and return a function of (kernel, operands of each thread, seed) to the results.

    The results are 64-bit words (threads, SLOTS). All bits of an unwritten result are set.
    """
    names = {test: f"kernel_{number}" for number, test in enumerate(bodies)}
    text = HEAD + "".join(KERNEL.format(name=names[test], body=body) for test, body in bodies.items())
    library = load(simulate_ptx(text, build_folder(factory) / f"{name}.so"))

    def run(test: str, operands: Sequence[Sequence[int]] | np.ndarray, seed: int = 0) -> np.ndarray:
        source = np.zeros((len(operands), SLOTS), np.uint64)
        for row, values in zip(source, operands, strict=True):
            row[: len(values)] = values
        out = copy(np.full(source.shape, 2**64 - 1, np.uint64))
        library.ptx_seed(seed)
        launch(library, names[test], (1, 1, 1), (len(source), 1, 1), [copy(source), out])
        return out

    return run


def words(count: int) -> list[list[int]]:
    """Return random operands of ``count`` threads."""
    rng = random.Random(0)
    return [[rng.getrandbits(64) for _ in range(SLOTS)] for _ in range(count)]


def low(word: Any, bits: int) -> int:
    return int(word) % (1 << bits)
