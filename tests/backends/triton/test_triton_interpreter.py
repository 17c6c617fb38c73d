"""Triton's interpreter: that it computes what a GPU computes, and two tests of the kernels that only it allows.

It can run the last programs of a grid alone, on memory that is not there, and it can run kernels that were broken on
purpose: each such mutation turns a named test of the Triton kernels red."""

from __future__ import annotations

import functools
import importlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import BF16, F16, F32, HAS_TRITON, Types, arguments, assert_identical, cotangents, fused, needs_triton
from torch import Tensor

import depthlstm_fast as dl

INTERPRETED = HAS_TRITON and not torch.cuda.is_available()
pytestmark = [
    needs_triton,
    pytest.mark.skipif(HAS_TRITON and not INTERPRETED, reason="on a GPU Triton compiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of overflows
]

if INTERPRETED:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    module = importlib.import_module("triton.runtime.interpreter")
    interpreter = importlib.import_module("depthlstm_fast.kernels.common.interpreter")
    launcher = importlib.import_module("depthlstm_fast.kernels.common.launch")
    gates = importlib.import_module("depthlstm_fast.kernels.depth_lstm")

    @triton.jit
    def convert_kernel(source, target, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))

    @triton.jit
    def triangle_kernel(out, count, STEP: tl.constexpr):
        """The sum of the numbers below count in steps, by a loop whose bounds are known when it runs."""
        total = tl.zeros((1,), tl.int64)
        for number in tl.range(tl.program_id(0), tl.cdiv(count, STEP), tl.num_programs(0), num_stages=2):
            total += tl.cast(number, tl.int64)
        tl.store(out + tl.program_id(0) + tl.arange(0, 1), total)

    @triton.jit
    def _combine(total, largest, place, other_total, other_largest, other_place):
        first = (largest > other_largest) | ((largest == other_largest) & (place < other_place))
        return total + other_total, tl.where(first, largest, other_largest), tl.where(first, place, other_place)

    @triton.jit
    def reduce_kernel(
        source,
        totals,
        largest,
        places,
        AXIS: tl.constexpr,
        KEEP: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        x = tl.load(source + rows * COLUMNS + columns)
        number = rows * COLUMNS + columns
        total, high, place = tl.reduce((x, x, number), AXIS, _combine, keep_dims=KEEP)
        at = tl.arange(0, COLUMNS if AXIS == 0 else ROWS)
        if KEEP:
            at = at[None, :] if AXIS == 0 else at[:, None]
        tl.store(totals + at, total)
        tl.store(largest + at, high)
        tl.store(places + at, place)


def run(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    launcher.launch(kernel, grid, given, {}, launcher.Launch(1, constants), False)


# --- what a GPU computes


def nearest_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of the bf16 number nearest to fp32 ``bits``, ties to even, found by comparing distances in fp64."""
    low = bits >> np.uint32(16) << np.uint32(16)
    infinity = np.uint32(0x7F800000)

    def magnitude(x: np.ndarray) -> np.ndarray:
        positive = x & np.uint32(0x7FFFFFFF)
        finite = np.where(positive < infinity, positive, np.uint32(0)).view(np.float32).astype(np.float64)
        return np.where(positive < infinity, finite, 2.0**128)  # infinity stands where the next number would

    x, below, above = magnitude(bits), magnitude(low), magnitude(low + np.uint32(0x10000))
    odd = (low >> np.uint32(16)) & np.uint32(1)
    up = (above - x < x - below) | ((above - x == x - below) & (odd == 1))
    result = (low >> np.uint32(16)) + up.astype(np.uint32)
    return np.where((bits & infinity) == infinity, bits >> np.uint32(16), result).astype(np.uint16)


def patterns() -> Tensor:
    """fp32 numbers of every kind, as bits: random ones, ties, neighbours of ties, subnormals, the largest, infinities,
    NaN.
    """
    random = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64)
    ties = (torch.randint(-(2**15), 2**15, (1 << 13,)) << 16) + 0x8000
    subnormal = torch.randint(0, 1 << 23, (1 << 12,))
    special = torch.tensor(
        [0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000]
    )
    every = torch.cat((random, ties, ties - 1, ties + 1, subnormal, subnormal - 2**31, special))
    size = triton.next_power_of_2(len(every))
    every = torch.cat((every, torch.zeros(size - len(every), dtype=torch.int64)))
    return torch.from_numpy((every.numpy() & 0xFFFFFFFF).astype(np.uint32).view(np.float32))


def test_rounding_to_bf16() -> None:
    source = patterns()
    found = torch.empty(source.shape, dtype=BF16)
    run(convert_kernel, (1,), source, found, SIZE=len(source))
    wanted = torch.from_numpy(nearest_bf16(source.numpy().view(np.uint32)).view(np.int16))
    numbers = ~source.isnan()
    assert torch.equal(found.view(torch.int16)[numbers], wanted[numbers])
    assert found[~numbers].isnan().all()
    # torch may use an instruction of the CPU that takes subnormal numbers for zeros
    normal = numbers & ((source == 0) | (source.abs() >= torch.finfo(F32).smallest_normal))
    assert torch.equal(found[normal].view(torch.int16), source.to(BF16)[normal].view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_conversion_to_fp32_is_exact(dtype: torch.dtype) -> None:
    source = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = torch.empty(source.shape, dtype=F32)
    run(convert_kernel, (1,), source, found, SIZE=1 << 16)
    assert torch.equal(found.isnan(), source.isnan())
    numbers = ~source.isnan()
    assert torch.equal(found.view(torch.int32)[numbers], source.to(F32).view(torch.int32)[numbers])


def test_rounding_to_fp16() -> None:
    source = patterns() * 1e-30  # most of fp32 is beyond fp16
    found = torch.empty(source.shape, dtype=F16)
    run(convert_kernel, (1,), source, found, SIZE=len(source))
    numbers = ~source.isnan()
    assert torch.equal(found.view(torch.int16)[numbers], source.to(F16).view(torch.int16)[numbers])
    assert found[~numbers].isnan().all()


@pytest.mark.parametrize(("count", "programs"), [(0, 1), (1, 1), (9, 2), (16, 3), (17, 3)])
def test_loop_bounds_that_are_known_when_it_runs(count: int, programs: int) -> None:
    found = torch.empty(programs, dtype=torch.int64)
    run(triangle_kernel, (programs,), found, count, STEP=4)
    assert found.tolist() == [sum(range(program, -(-count // 4), programs)) for program in range(programs)]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 8), (4, 1), (4, 8)], ids=str)
def test_reductions_equal_those_of_triton(shape: tuple[int, int], axis: int, keep: bool) -> None:
    """By halves and element by element, of small integers, whose sums are the same in any order."""
    source = torch.randint(-4, 5, shape).to(F32)
    sizes = {"AXIS": axis, "KEEP": keep, "ROWS": shape[0], "COLUMNS": shape[1]}
    found, wanted = ([torch.empty(shape[1 - axis], dtype=dtype) for dtype in (F32, F32, torch.int32)] for _ in range(2))
    run(reduce_kernel, (1,), source, *found, **sizes)
    reduce_kernel[(1,)](source, *wanted, **sizes)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[0], source.sum(axis))
    assert torch.equal(found[1], source.amax(axis))


def changeable() -> dict[str, Any]:
    """Everything of Triton's interpreter that could be replaced."""
    parts = {
        "module": module,
        "builder": module.InterpreterBuilder,
        "reduce": module.ReduceOps,
        "function": module.InterpretedFunction,
    }
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in vars(part).items()
        if not key.startswith("__")
    }


def test_nothing_is_changed_outside() -> None:
    before = changeable()
    with interpreter.patched():
        inside = changeable()
    assert any(inside[key] is not value for key, value in before.items())
    fused(*(torch.randn(2, n) for n in (8, 2)), backend="triton")
    with pytest.raises(KeyError), interpreter.patched():
        raise KeyError
    after = changeable()
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if after[key] is not value] == []


# --- the last programs of a grid


class LazyMemory:
    """Stands for the module torch in the launcher: what it allocates is not there before it is touched, nor is what
    lies before it.
    """

    def __getattr__(self, attribute: str) -> Any:
        return getattr(torch, attribute)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        size, before = math.prod(shape), 2**31  # where an offset that wrapped would lead
        no_reserve = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on
        pages = mmap.mmap(
            -1, (before + size + 4096) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        )
        return torch.frombuffer(pages, dtype=dtype)[before : before + size].view(shape)


def run_last_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on each kernel runs its last tile alone, on lazy memory."""
    launch, builder = gates.launch, module.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def launch_last(
        kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any, plan: Any, aligned: bool
    ) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        tiles = -(
            -named.get("rows", grid[0]) // plan.constants.get("ROWS", 1)
        )  # the kernel without an argument `rows` has a program a row
        axis = len(grid) - 1

        def from_the_last(*index: int) -> None:
            set_grid_idx(*index)
            builder.grid_idx = tuple(place + (tiles - 1) * (dim == axis) for dim, place in enumerate(index))

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", from_the_last)
            launch(kernel, (*grid[:axis], 1), arguments, constants, plan, aligned)

    monkeypatch.setattr(gates, "torch", LazyMemory())
    monkeypatch.setattr(gates, "WARPS", 1)  # one program, which takes one tile after the other
    monkeypatch.setattr(gates, "launch", launch_last)


@pytest.mark.parametrize(("scheme", "features"), [("narrow", 33), ("wide", 20)])
def test_outputs_of_more_than_2_to_the_31_elements(scheme: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of h, of c and of every gradient by row, and in the wide scheme of the statistics, lies beyond
    2^31.
    """
    if scheme == "wide":
        monkeypatch.setattr(gates, "narrow_plans", lambda *_: [])
        monkeypatch.setattr(gates, "WIDE_PLANS", [launcher.Launch(1, {"ROWS": 2, "BLOCK": 16, "STAGES": 2})])
        monkeypatch.setattr(gates, "ROW_SUMS_PLAN", launcher.Launch(1, {"BLOCK": 16}))
    tensors, _ = arguments(1, features, Types(BF16, BF16, BF16), affine=False, kind="given")
    dh, dc = cotangents(tensors)
    rows = 2**31 // features // 64 * 64 + 65  # alone in the last tile

    def outputs(count: int) -> dict[str, Tensor]:
        z, c, hidden, *grads = (x.expand(count, -1) for x in (*tensors.values(), dh, dc))
        inputs = (z, None, hidden, c, None, None, None, 0, 0, 1e-6, 0.0)
        h, c_out = gates.gates_forward(*inputs)
        dz, dhidden, dc_in, *_ = gates.gates_backward(*grads, *inputs, False, False)
        return {"h": h, "c_out": c_out, "dz": dz, "dhidden": dhidden, "dc": dc_in}

    wanted = outputs(1)
    try:
        run_last_tiles(monkeypatch)
        found = outputs(rows)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    assert min(x.numel() for x in found.values()) > 2**31
    assert_identical({key: x[-1:] for key, x in found.items()}, wanted)


# --- kernels that are broken on purpose


TESTS = Path(__file__).resolve().parents[2]


@functools.cache
def file_of(test: str) -> str:
    """The file that has this test of the Triton kernels, below tests/."""
    files = sorted((*Path(__file__).parent.glob("test_triton*.py"), *(TESTS / "conformance").glob("test_*.py")))
    (found,) = (str(file.relative_to(TESTS)) for file in files if f"\ndef {test}(" in file.read_text(encoding="utf-8"))
    return found


class Mutation(NamedTuple):
    """In a file of the kernels ``old`` becomes ``new`` at its ``place``-th occurrence; ``test`` then fails with
    ``words``.
    """

    file: str
    old: str
    new: str
    test: str
    words: str
    place: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} ({self.place}) -> {self.new!r}"

    def node(self) -> str:
        return f"{file_of(self.test.split('[')[0])}::{self.test}"


# tests
# D = 7 in tiles of 16 columns, 5 rows in tiles of 16
SMALL = "test_error_bound[depth_lstm-triton-narrow-f32-f32-f32-gate-True-gelu]"
ROW, TILES, WIDE_TILES = (
    f"test_rows[depth_lstm-triton-{case}]" for case in ("narrow-1-33", "narrow-17-33", "wide-5-20")
)
NOT_THERE = "test_columns_and_rows_that_are_not_there[gate-gelu_tanh]"
FAR_NARROW, FAR_WIDE = (
    f"test_rows_more_than_2_to_the_31_elements_apart[{scheme}-gelu]" for scheme in ("narrow", "wide")
)
LONG_NARROW, LONG_WIDE = (
    f"test_outputs_of_more_than_2_to_the_31_elements[{case}]" for case in ("narrow-33", "wide-20")
)
PHILOX, WIDE_PHILOX = "test_dropout_mask[0-narrow]", "test_dropout_mask[0-wide]"
DROPOUT, WIDE_DROPOUT = (f"test_error_bound_with_dropout[{scheme}-gate-True-gelu]" for scheme in ("narrow", "wide"))
# what they say
BOUND, POISON, GUARD, UNEQUAL = (
    r"error [\d.e+-]+, allowed",
    "error nan, allowed",
    "guard: written beside",
    "assert False|Mismatched",
)
# what is broken
INSIDE = "inside = (row < rows) & (column < FEATURES)"
ANY_ROW = "inside = (row >= 0) & (column < FEATURES)"
TILE, TILE32 = "(tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))", "(tile * ROWS + tl.arange(0, ROWS))"
NUMBER, NUMBER32 = "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"
HALF_UP = "bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))"

MUTATIONS = [
    # masks of loads, of stores, of sums: NaN beside the arguments is read, guards beside the results are written
    Mutation("common/tiles.py", "tl.load(at, mask=inside, other=0.0)", "tl.load(at)", SMALL, POISON),
    Mutation("common/tiles.py", "tl.store(at, value, mask=inside)", "tl.store(at, value)", ROW, GUARD),
    Mutation("depth_lstm.py", "keep_dims=True), mask=column < FEATURES)", "keep_dims=True))", SMALL, GUARD),
    Mutation("depth_lstm.py", "mask=column < width", "mask=column >= 0", SMALL, GUARD),
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, ROW, GUARD),  # forward
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, ROW, POISON, 1),  # narrow
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, WIDE_TILES, POISON, 2),
    Mutation("common/tiles.py", "tile = tl.where(inside, tile, 0.0)", "tile = tile", SMALL, BOUND),  # of the statistics
    Mutation("common/tiles.py", "tile = tl.where(inside, tile, 0.0)", "tile = tile", NOT_THERE, POISON, 1),
    Mutation(
        "depth_lstm.py",
        "tl.minimum(row, rows - 1)",
        "row",
        "test_z_bias[depth_lstm-triton-narrow-f32-f32-f32-gate-True-gelu]",
        POISON,
    ),
    # offsets: of the gates, and beyond 2^31
    Mutation("common/tiles.py", "load(at + k * FEATURES", "load(at + (k + 1) * FEATURES", SMALL, POISON),
    Mutation("depth_lstm.py", "+ column, dz_tiles[k]", "+ column, dz_tiles[0]", SMALL, BOUND),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, FAR_NARROW, BOUND),  # forward
    Mutation("depth_lstm.py", NUMBER, NUMBER32, FAR_WIDE, BOUND, 1),  # row_sums
    Mutation("depth_lstm.py", TILE, TILE32, FAR_NARROW, BOUND),
    Mutation("depth_lstm.py", TILE, TILE32, FAR_WIDE, BOUND, 1),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, LONG_NARROW, UNEQUAL),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, LONG_WIDE, UNEQUAL, 1),
    Mutation("depth_lstm.py", TILE, TILE32, LONG_NARROW, UNEQUAL),
    Mutation("depth_lstm.py", TILE, TILE32, LONG_WIDE, UNEQUAL, 1),
    # loops that end a tile too early, or after the first partial sums
    Mutation(
        "depth_lstm.py", "tl.cdiv(rows, ROWS), tl.num_programs(0)", "rows // ROWS, tl.num_programs(0)", TILES, POISON
    ),
    Mutation(
        "depth_lstm.py",
        "tl.cdiv(rows, ROWS), tl.num_programs(1)",
        "rows // ROWS, tl.num_programs(1)",
        WIDE_TILES,
        POISON,
    ),
    Mutation(
        "depth_lstm.py",
        "tl.range(0, programs, ROWS)",
        "tl.range(0, ROWS, ROWS)",
        "test_more_rows_than_programs[18-273-1]",
        BOUND,
    ),
    # mathematics
    Mutation(
        "common/tiles.py",
        "-rest[k] * ",
        "0.0 * rest[k] * ",
        "test_constant_rows[depth_lstm-triton-narrow-gate-f32-f32-f32-41]",
        BOUND,
    ),
    Mutation("common/tiles.py", " - n[k] * mean_un[k]", "", SMALL, BOUND),
    Mutation("common/tiles.py", "u[k] - mean_u[k]", "u[k]", SMALL, BOUND),
    Mutation(
        "common/tiles.py",
        "rsqrt(variance + eps)",
        "rsqrt(variance + 1e-6)",
        "test_eps[depth_lstm-triton-narrow-gate-0.5-f32-f32-f32]",
        BOUND,
    ),
    Mutation(
        "common/tiles.py",
        'NORM == "joint"',
        'NORM == "neither"',
        "test_error_bound[depth_lstm-triton-narrow-f32-f32-f32-joint-True-gelu]",
        BOUND,
    ),
    Mutation("depth_lstm.py", "(dweight, dbias) if affine", "(dbias, dweight) if affine", SMALL, BOUND),
    Mutation("depth_lstm.py", "sums[GATES + k] + da[k]", "da[k]", "test_more_rows_than_programs[2-18-33]", BOUND),
    # dropout: order of the words, blocks, rows, scale
    Mutation(
        "common/formulas.py", "tl.join(w0, w2), tl.join(w1, w3)", "tl.join(w0, w1), tl.join(w2, w3)", PHILOX, UNEQUAL
    ),
    Mutation(
        "common/formulas.py",
        "(first // 4 + tl.arange(0, BLOCK // 4))",
        "tl.arange(0, BLOCK // 4)",
        WIDE_PHILOX,
        UNEQUAL,
    ),
    Mutation(
        "depth_lstm.py",
        "rows, row, column, first, inside, dh_stride",
        "rows, row, column, 0, inside, dh_stride",
        WIDE_PHILOX,
        UNEQUAL,
        1,
    ),
    Mutation("depth_lstm.py", "key, 1, row, column, first", "key, 1, row, column, 0", WIDE_DROPOUT, BOUND),  # row_sums
    Mutation("common/formulas.py", "(row >> 32)", "(row & 0)", "test_dropout_of_far_rows[5-0-1099511627781]", "assert"),
    Mutation("depth_lstm.py", "g * factor, slope * factor", "g * factor, slope * (factor > 0)", DROPOUT, BOUND),
    # the interpreter's own rounding
    Mutation("common/interpreter.py", HALF_UP, "bits", "test_rounding_to_bf16", UNEQUAL),
    Mutation("common/interpreter.py", HALF_UP, "bits + np.uint32(0x8000)", "test_rounding_to_bf16", UNEQUAL),
]

# One pytest session collects the tests; each mutation runs its test in a fork of it, in which the kernels are imported
# anew, and what the tests hold of the old ones is replaced.
SESSION = """
import importlib, json, os, sys, traceback
import pytest, torch

torch.set_num_threads(1)  # before any fork
tests, jobs = json.load(sys.stdin)


def import_kernels_from(folder):
    package = sys.modules["depthlstm_fast.kernels"]
    old = {name: module for name, module in sys.modules.items() if name.startswith("depthlstm_fast.kernels.")}
    for name in old:
        del sys.modules[name]
        vars(package).pop(name.split(".")[-1], None)
    package.__path__ = [folder]
    importlib.import_module("depthlstm_fast.backends.triton").kernels.cache_clear()
    importlib.import_module("depthlstm_fast.kernels.depth_lstm")
    new = {name: importlib.import_module(name) for name in old}
    names = [name for name in sys.modules if name.startswith(("test_triton", "triton_helpers"))]
    for held in [vars(sys.modules[name]) for name in names]:
        for key, value in list(held.items()):
            for name, module in old.items():
                if value is module:
                    held[key] = new[name]
                elif vars(module).get(key) is value:
                    held[key] = vars(new[name])[key]


class Plugin:
    def pytest_runtestloop(self, session):
        running = set()
        for folder, chosen in jobs:
            if len(running) == 2:
                running.remove(os.wait()[0])
            child = os.fork()
            if child == 0:
                self.failures = []
                try:
                    import_kernels_from(folder)
                    for item in session.items:
                        if item.nodeid.partition("tests/")[2] in chosen:
                            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
                            chosen.remove(item.nodeid.partition("tests/")[2])
                except BaseException:
                    self.failures.append(traceback.format_exc())
                with open(os.path.join(folder, "result.json"), "w") as file:
                    json.dump({"missing": chosen, "failures": self.failures}, file)
                os._exit(0)
            running.add(child)
        for child in running:
            os.waitpid(child, 0)
        return True

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.failures.append(report.longreprtext)


sys.exit(pytest.main(["-q", "-s", "--tb=short", "-p", "no:cacheprovider", *tests], plugins=[Plugin()]))
"""


def mutate(text: str, mutation: Mutation) -> str:
    parts = text.split(mutation.old)
    assert len(parts) > mutation.place + 1, f"what is to be broken is not there: {mutation}"
    head, tail = parts[: mutation.place + 1], parts[mutation.place + 1 :]
    return mutation.old.join(head) + mutation.new + mutation.old.join(tail)


@pytest.mark.slow
def test_mutations_are_caught(tmp_path: Path) -> None:
    """Every mutation by the test that is named for it, in the words of that test's own check; without one, all of them
    pass.
    """
    tests = sorted({mutation.node() for mutation in MUTATIONS})
    jobs: list[tuple[Path, list[str]]] = []
    for number, mutation in enumerate([None, *MUTATIONS]):
        folder = tmp_path / str(number)
        shutil.copytree(Path(dl.__file__).parent / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file = folder / mutation.file
            file.write_text(mutate(file.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        jobs.append((folder, tests if mutation is None else [mutation.node()]))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    text = json.dumps(([str(TESTS / test) for test in tests], [(str(folder), chosen) for folder, chosen in jobs]))
    command = [sys.executable, "-c", SESSION]
    run = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=TESTS.parent, env=environment, timeout=600, check=False
    )
    survivors = []
    for (folder, _), mutation in zip(jobs, [None, *MUTATIONS], strict=True):
        assert (folder / "result.json").exists(), run.stdout + run.stderr
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert not result["missing"], "\n".join([run.stdout + run.stderr, *result["missing"], *result["failures"]])
        if mutation is None:
            assert not result["failures"], "\n".join(result["failures"])
        elif not any(re.search(rf"^E .*{mutation.words}", failure, re.M) for failure in result["failures"]):
            survivors.append(
                "\n".join([f"{mutation}: {mutation.test} does not say {mutation.words!r}", *result["failures"]])
            )
    assert not survivors, "\n\n".join(survivors)
