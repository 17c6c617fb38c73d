"""Cost over tokens, width, depth and threads, each beside its floor or rival; bytes kept over depth.

A curve is one quantity over one axis. Its contestants are timed in turn at every point, as everywhere in the suite. A
kernel's work is linear in tokens and in layers. :mod:`..measure.curves` says how far each point is from a line, so that
a bend is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import allocator, matrix_products
from ..measure.calls import Runs
from ..measure.curves import Curve, curve, point
from ..measure.kept import kept_bytes
from ..measure.place import Place
from ..measure.problems import Maker, Problem, Subject
from ..measure.rows import Row, Settings, Target
from . import gates

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16, 32, 48)
ROWS, FEATURES = 4096, 512
LAYER_FEATURES, LAYER_HEADS, BATCH, LENGTH = 128, 4, 8, 32
RESIDUAL = "nn.TransformerEncoder, pre-norm"
# above this size eager PyTorch takes seconds, and its curve is straight long before
EAGER_ELEMENTS = 4096 * 2048


def gates_runs(rows: int, features: int, backward: bool) -> Runs:
    """Return fused gates, the copy of the same bytes and, unless it takes seconds, eager PyTorch."""
    runs = (gates.training if backward else gates.forward)(Place(), rows=rows, features=features).runs
    names = ("fused", "against", "eager") if rows * features <= EAGER_ELEMENTS else ("fused", "against")
    return {name: runs[name] for name in names}


def gates_curve(
    axis: str, backward: bool, kept: bool, sizes: Iterable[int], settings: Settings, tick: Callable[[], None]
) -> Curve:
    """Return the curve of the gates over tokens (D fixed) or over width (N fixed), with memory as it is or kept."""
    points = []
    for size in sizes:
        rows, features = (size, FEATURES) if axis == "tokens" else (ROWS, size)
        with torch.set_grad_enabled(backward), allocator.keeping(kept):
            runs = gates_runs(rows, features, backward)
            points.append(point(size, runs, settings, tick))
        del runs
        elements = gates.FORWARD_ELEMENTS + (gates.BACKWARD_ELEMENTS if backward else 0)
        points[-1]["bytes"] = gates.moved_bytes(rows, features, torch.float32, elements)
    name = ("gates forward + backward" if backward else "gates forward") + (allocator.KEPT if kept else "")
    return curve(
        name, axis, f"fp32, {f'D={FEATURES}' if axis == 'tokens' else f'N={ROWS}'}", "copy of the same bytes", points
    )


def thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of threads that torch was started with."""
    most = torch.get_num_threads()
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def threads_curve(settings: Settings, tick: Callable[[], None]) -> Curve:
    """Return the curve of gates forward + backward with 1 to all threads; the copy has as many."""
    before, points = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            runs = gates_runs(ROWS, FEATURES, backward=True)
            points.append(point(threads, {name: runs[name] for name in ("fused", "against")}, settings, tick))
    finally:
        torch.set_num_threads(before)
    return curve(
        "gates forward + backward", "threads", f"fp32, N={ROWS} D={FEATURES}", "copy of the same bytes", points
    )


def encoders(depth: int) -> dict[str, nn.Module]:
    """Return stacks of ``depth`` layers with equally many matrix entries.

    They are the fused one, its plain PyTorch twin, and torch's residual one.
    """
    width: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    eager = dl.reference.DepthLSTMEncoder(
        dl.reference.DepthLSTMEncoderLayer(LAYER_FEATURES, LAYER_HEADS, **width), depth
    )
    fused = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(LAYER_FEATURES, LAYER_HEADS, **width), depth)
    fused.load_state_dict(eager.state_dict())
    residual = nn.TransformerEncoderLayer(
        LAYER_FEATURES, LAYER_HEADS, 4 * LAYER_FEATURES, activation="gelu", norm_first=True, **width
    )
    return {
        "fused": fused,
        "against": nn.TransformerEncoder(
            residual, depth, norm=nn.LayerNorm(LAYER_FEATURES), enable_nested_tensor=False
        ),
        "eager": eager,
    }


def encoder_step(module: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward with the gradients of the input and of all parameters."""
    return torch.autograd.grad(module(x), [x, *module.parameters()], cotangent)


def depth_curves(depths: Sequence[int], settings: Settings, tick: Callable[[], None]) -> list[Curve]:
    """Return the curves of an encoder's training step over its layers, and of the bytes that it keeps for backward.

    The step has two curves, with memory as it is and kept.
    """
    times: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    kept = []
    x, cotangent = (
        torch.randn(BATCH, LENGTH, LAYER_FEATURES, requires_grad=True),
        torch.randn(BATCH, LENGTH, LAYER_FEATURES),
    )
    for depth in depths:
        stacks = encoders(depth)
        found = {
            name: kept_bytes(functools.partial(module, x), module.parameters()) / 1e6 for name, module in stacks.items()
        }
        kept.append(
            {"x": depth, "values": {name: {"median": size, "p10": size, "p90": size} for name, size in found.items()}}
        )
        runs: Runs = {name: functools.partial(encoder_step, module, x, cotangent) for name, module in stacks.items()}
        for keeps, points in times.items():
            with allocator.keeping(keeps):
                points.append(point(depth, runs, settings, tick, seconds=1.0))
    fixed = f"fp32, {BATCH}x{LENGTH} tokens, D={LAYER_FEATURES}"
    steps = [
        curve("encoder training step" + (allocator.KEPT if keeps else ""), "layers", fixed, RESIDUAL, points)
        for keeps, points in times.items()
    ]
    return [*steps, curve("bytes kept by an encoder", "layers", fixed, RESIDUAL, kept, "MB")]


def sizes_in(settings: Settings, sizes: Sequence[int]) -> Sequence[int]:
    """Return every size, or without the largest every second one if ``settings`` ask for few repetitions."""
    return sizes if settings.minimum >= 7 else sizes[:-1:2]


def measure_curves(settings: Settings, tick: Callable[[], None] = lambda: None) -> list[Curve]:
    """Return all curves."""
    found = [
        gates_curve(axis, backward, kept, sizes_in(settings, sizes), settings, tick)
        for axis, sizes in (("tokens", TOKENS), ("width", WIDTHS))
        for backward in (False, True)
        for kept in (False, True)
    ]
    return [*found, threads_curve(settings, tick), *depth_curves(sizes_in(settings, DEPTHS), settings, tick)]


def gates_problem(place: Place, rows: int = ROWS, features: int = FEATURES) -> Problem:
    """Make one point of the curves a row, for pytest: gates forward + backward."""
    row = Row(
        "scaling", "gates forward + backward", "fp32", f"N={rows} D={features}", "ms", against="copy of the same bytes"
    )
    size = gates.moved_bytes(rows, features, torch.float32, gates.FORWARD_ELEMENTS + gates.BACKWARD_ELEMENTS)
    runs, flops = gates_runs(rows, features, backward=True), gates.operations(rows, features, backward=True)
    targets = [Target("eager", "speedup"), Target("against", "share")]
    return Problem(row, runs, targets, 0.5, moved_bytes=size, flops=flops, floor="against", place=place)


def depth_problem(place: Place, layers: int) -> Problem:
    """Make one point of the curves a row, for pytest: the training step of an encoder."""
    x, cotangent = (
        torch.randn(BATCH, LENGTH, LAYER_FEATURES, requires_grad=True),
        torch.randn(BATCH, LENGTH, LAYER_FEATURES),
    )
    size = f"{layers} layers, {BATCH}x{LENGTH} D={LAYER_FEATURES}"
    row = Row("scaling", "encoder training step", "fp32", size, "ms", against=RESIDUAL)
    runs: Runs = {
        name: functools.partial(encoder_step, module, x, cotangent) for name, module in encoders(layers).items()
    }
    flops = layers * matrix_products.training_flops(
        matrix_products.encoder_layer(BATCH, LENGTH, LAYER_FEATURES, LAYER_HEADS)
    )
    return Problem(row, runs, [Target("eager", "speedup"), Target("against", "ratio")], 1.0, flops=flops, place=place)


PROBLEMS: dict[str, Maker] = {
    **{f"{rows} tokens": functools.partial(gates_problem, rows=rows) for rows in TOKENS},
    **{f"{features} features": functools.partial(gates_problem, features=features) for features in WIDTHS},
    **{f"{layers} layers": functools.partial(depth_problem, layers=layers) for layers in DEPTHS},
}


def points_in(settings: Settings) -> int:
    """Return how often ``measure_curves`` calls its ``tick``."""
    tokens, widths, depths = (len(sizes_in(settings, sizes)) for sizes in (TOKENS, WIDTHS, DEPTHS))
    return 4 * (tokens + widths) + 2 * depths + len(thread_counts())


SUBJECT = Subject("scaling", PROBLEMS, needs=("gates", "layer"), in_table=False, ticks=points_in)
