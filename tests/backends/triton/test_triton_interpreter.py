"""Triton's interpreter computes what a GPU computes; and two kinds of kernel tests that need it.

It can run the last programs of a grid alone, on memory that does not exist. It can also run deliberately broken
kernels. Each such mutation makes a named test of the Triton kernels fail.
"""

from __future__ import annotations

import importlib
import math
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BF16, F16, F32, HAS_TRITON, Types, arguments, assert_identical, cotangents, fused, needs_triton
from torch import Tensor

INTERPRETED = HAS_TRITON and not torch.cuda.is_available()
pytestmark = [
    needs_triton,
    pytest.mark.skipif(HAS_TRITON and not INTERPRETED, reason="on a GPU Triton compiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's overflows
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
        """Sum the numbers below count in steps, by a loop with bounds known only at run time."""
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


# --- agreement with a GPU


def nearest_bf16(bits: np.ndarray) -> np.ndarray:
    """Return the bits of the bf16 number nearest to fp32 ``bits``, ties to even, by comparing distances in fp64."""
    low = bits >> np.uint32(16) << np.uint32(16)
    infinity = np.uint32(0x7F800000)

    def magnitude(x: np.ndarray) -> np.ndarray:
        positive = x & np.uint32(0x7FFFFFFF)
        finite = np.where(positive < infinity, positive, np.uint32(0)).view(np.float32).astype(np.float64)
        return np.where(positive < infinity, finite, 2.0**128)  # infinity stands for the next number

    x, below, above = magnitude(bits), magnitude(low), magnitude(low + np.uint32(0x10000))
    odd = (low >> np.uint32(16)) & np.uint32(1)
    up = (above - x < x - below) | ((above - x == x - below) & (odd == 1))
    result = (low >> np.uint32(16)) + up.astype(np.uint32)
    return np.where((bits & infinity) == infinity, bits >> np.uint32(16), result).astype(np.uint16)


def patterns() -> Tensor:
    """Return fp32 numbers of every kind, as bits.

    They are random ones, ties, neighbours of ties, subnormals, the largest, infinities, NaN.
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
    # torch may use a CPU instruction that takes subnormal numbers for zeros
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
    source = patterns() * 1e-30  # most of fp32 exceeds fp16
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
    """Check reductions by halves and element by element, on small integers, whose sums are the same in any order."""
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
    """Return all parts of Triton's interpreter that could be replaced."""
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
    """Stand-in for the module torch in the launcher.

    Its memory does not exist before it is touched, and neither does the memory before it.
    """

    def __getattr__(self, attribute: str) -> Any:
        return getattr(torch, attribute)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        size, before = math.prod(shape), 2**31  # the place of an offset that wrapped
        no_reserve = 0x4000  # Linux's MAP_NORESERVE, which mmap names from Python 3.13 on
        pages = mmap.mmap(
            -1, (before + size + 4096) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        )
        return torch.frombuffer(pages, dtype=dtype)[before : before + size].view(shape)


def run_last_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each kernel run only its last tile, on lazy memory."""
    launch, builder = gates.launch, module.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def launch_last(
        kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any, plan: Any, aligned: bool
    ) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        # the kernel without an argument `rows` has a program a row
        tiles = -(-named.get("rows", grid[0]) // plan.constants.get("ROWS", 1))
        axis = len(grid) - 1

        def from_the_last(*index: int) -> None:
            set_grid_idx(*index)
            builder.grid_idx = tuple(place + (tiles - 1) * (dim == axis) for dim, place in enumerate(index))

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", from_the_last)
            launch(kernel, (*grid[:axis], 1), arguments, constants, plan, aligned)

    monkeypatch.setattr(gates, "torch", LazyMemory())
    monkeypatch.setattr(gates, "WARPS", 1)  # one program, which takes the tiles one after the other
    monkeypatch.setattr(gates, "launch", launch_last)


@pytest.mark.parametrize(("scheme", "features"), [("narrow", 33), ("wide", 20)])
def test_outputs_of_more_than_2_to_the_31_elements(scheme: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the last row of h, c and every row gradient, which lies beyond 2^31.

    The wide scheme's statistics are included.
    """
    if scheme == "wide":
        monkeypatch.setattr(gates, "narrow_plans", lambda *_: [])
        monkeypatch.setattr(gates, "WIDE_PLANS", [launcher.Launch(1, {"ROWS": 2, "BLOCK": 16, "STAGES": 2})])
        monkeypatch.setattr(gates, "ROW_SUMS_PLAN", launcher.Launch(1, {"BLOCK": 16}))
    tensors, _ = arguments(1, features, Types(BF16, BF16, BF16), affine=False, kind="given")
    dh, dc = cotangents(tensors)
    rows = 2**31 // features // 64 * 64 + 65  # the last row is alone in the last tile

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
