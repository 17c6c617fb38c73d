"""Cost against tokens, width, depth and threads, each beside its floor or rival; bytes kept against depth.

A curve is one quantity over one axis. Its contestants are timed in turn at every point, as everywhere in the suite. What a kernel does is
linear in tokens and in layers; :func:`fit` says how far each point is from that, so that a curve that bends is seen as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import matrix_products
from ..measure.compiled import Compiled, reference_gates
from ..measure.problems import Problem, Runs
from ..measure.rows import Row, Settings, Target
from ..measure.timing import interleave, spread
from . import gates
from .memory import kept_bytes

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16, 32, 48)
ROWS, FEATURES = 4096, 512
LAYER_FEATURES, LAYER_HEADS, BATCH, LENGTH = 128, 4, 8, 32
RESIDUAL = "nn.TransformerEncoder, pre-norm"
# eager PyTorch takes seconds beyond, and its curve is straight long before
EAGER_ELEMENTS = 4096 * 2048
# a point further than this from a fixed cost and a constant cost a unit is named
BEND = 0.25

Curve = dict[str, Any]


def fit(xs: Sequence[float], times: Sequence[float]) -> tuple[float, float, list[float]]:
    """``times`` as ``fixed + slope * x``: the two numbers, both at least 0, and each point's time over the line's.

    Least squares of relative errors, so that the points of small x count as much as those of large x.
    """
    columns = torch.tensor([[1 / time, x / time] for x, time in zip(xs, times, strict=True)], dtype=torch.float64)
    fixed, slope = torch.linalg.lstsq(columns, torch.ones(len(xs), 1, dtype=torch.float64)).solution.flatten().tolist()
    if fixed < 0:
        # a line through the origin: what is minimal then is sum (slope x / t - 1)^2
        fixed, slope = 0.0, float(columns[:, 1].sum() / columns[:, 1].square().sum())
    if slope < 0:
        fixed, slope = float(columns[:, 0].sum() / columns[:, 0].square().sum()), 0.0
    return fixed, slope, [time / (fixed + slope * x) for x, time in zip(xs, times, strict=True)]


def curve(name: str, axis: str, fixed: str, against: str, points: list[dict[str, Any]], unit: str = "ms") -> Curve:
    """A curve, fit for JSON, with the line through each contestant that is there at all points."""
    found: Curve = {"name": name, "axis": axis, "fixed": fixed, "unit": unit, "against": against, "points": points, "lines": {}}
    for side in points[0]["values"]:
        chosen = [point for point in points if side in point["values"]]
        if len(chosen) > 2 and axis != "threads":
            xs = [point["x"] for point in chosen]
            start, slope, over = fit(xs, [point["values"][side]["median"] for point in chosen])
            bent = {str(x): part for x, part in zip(xs, over, strict=True) if abs(part - 1) > BEND}
            found["lines"][side] = {"fixed": start, "slope": slope, "bent": bent}
    return found


def point(x: int, runs: Runs, settings: Settings, tick: Callable[[], None], seconds: float = 0.5) -> dict[str, Any]:
    """The contestants' milliseconds at one ``x``."""
    samples = interleave(runs, seconds=seconds * settings.seconds, minimum=settings.minimum, maximum=400, warmups=2)
    tick()
    return {
        "x": x,
        "values": {name: asdict(spread(times, 1e3)) for name, times in samples.items()},
        "repetitions": len(samples["fused"]),
    }


def gates_runs(rows: int, features: int, backward: bool, dtype: torch.dtype = torch.float32) -> Runs:
    """Fused gates, the copy of the same bytes and, where it does not take seconds, eager PyTorch."""
    inputs = gates.make_inputs(rows, features, dtype)
    z, c = inputs[:2]
    scratch = torch.empty(2 * c.numel(), dtype=dtype)
    forward_copy = gates.copy_forward(z, scratch)
    if not backward:
        runs: Runs = {"fused": lambda: dl.depth_lstm_gates(*inputs), "against": forward_copy}
        eager: Callable[[], object] = lambda: reference_gates(*inputs)  # noqa: E731
    else:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        cotangents = [torch.randn_like(c), torch.randn_like(c)]
        backward_copy = gates.copy_backward(z, c, cotangents[0], scratch)
        runs = {
            "fused": lambda: gates.forward_and_backward(dl.depth_lstm_gates, leaves, cotangents),
            "against": lambda: (forward_copy(), backward_copy()),
        }
        eager = lambda: gates.forward_and_backward(reference_gates, leaves, cotangents)  # noqa: E731
    return runs | ({"eager": eager} if rows * features <= EAGER_ELEMENTS else {})


def gates_curve(axis: str, backward: bool, sizes: Iterable[int], settings: Settings, tick: Callable[[], None]) -> Curve:
    """The gates over tokens (D fixed) or over width (N fixed)."""
    points = []
    with torch.set_grad_enabled(backward):
        for size in sizes:
            rows, features = (size, FEATURES) if axis == "tokens" else (ROWS, size)
            points.append(point(size, gates_runs(rows, features, backward), settings, tick))
            elements = gates.FORWARD_ELEMENTS + (gates.BACKWARD_ELEMENTS if backward else 0)
            points[-1]["bytes"] = gates.moved_bytes(rows, features, torch.float32, elements)
    name = "gates forward + backward" if backward else "gates forward"
    return curve(name, axis, f"fp32, {f'D={FEATURES}' if axis == 'tokens' else f'N={ROWS}'}", "copy of the same bytes", points)


def thread_counts() -> list[int]:
    """1, 2, 4, ... and as many threads as torch was started with."""
    most = torch.get_num_threads()
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def threads_curve(settings: Settings, tick: Callable[[], None]) -> Curve:
    """Gates forward + backward with 1 to all threads; the copy has as many."""
    before, points = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            runs = gates_runs(ROWS, FEATURES, backward=True)
            points.append(point(threads, {name: runs[name] for name in ("fused", "against")}, settings, tick))
    finally:
        torch.set_num_threads(before)
    return curve("gates forward + backward", "threads", f"fp32, N={ROWS} D={FEATURES}", "copy of the same bytes", points)


def encoders(depth: int) -> dict[str, nn.Module]:
    """Stacks of ``depth`` layers with equally many matrix entries: fused, its plain PyTorch twin, and torch's residual one."""
    width: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    eager = dl.reference.DepthLSTMEncoder(dl.reference.DepthLSTMEncoderLayer(LAYER_FEATURES, LAYER_HEADS, **width), depth)
    fused = dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(LAYER_FEATURES, LAYER_HEADS, **width), depth)
    fused.load_state_dict(eager.state_dict())
    residual = nn.TransformerEncoderLayer(LAYER_FEATURES, LAYER_HEADS, 4 * LAYER_FEATURES, activation="gelu", norm_first=True, **width)
    return {
        "fused": fused,
        "against": nn.TransformerEncoder(residual, depth, norm=nn.LayerNorm(LAYER_FEATURES), enable_nested_tensor=False),
        "eager": eager,
    }


def encoder_step(module: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward with the gradients of the input and of all parameters."""
    return torch.autograd.grad(module(x), [x, *module.parameters()], cotangent)


def depth_curves(depths: Iterable[int], settings: Settings, tick: Callable[[], None]) -> tuple[Curve, Curve]:
    """A training step of an encoder over its layers, and the bytes that it keeps for backward."""
    times, kept = [], []
    x, cotangent = torch.randn(BATCH, LENGTH, LAYER_FEATURES, requires_grad=True), torch.randn(BATCH, LENGTH, LAYER_FEATURES)
    for depth in depths:
        stacks = encoders(depth)
        found = {name: kept_bytes(lambda m=module: m(x), module.parameters()) / 1e6 for name, module in stacks.items()}  # type: ignore[misc]
        kept.append({"x": depth, "values": {name: {"median": size, "p10": size, "p90": size} for name, size in found.items()}})
        runs: Runs = {name: lambda m=module: encoder_step(m, x, cotangent) for name, module in stacks.items()}  # type: ignore[misc]
        times.append(point(depth, runs, settings, tick, seconds=1.0))
    fixed = f"fp32, {BATCH}x{LENGTH} tokens, D={LAYER_FEATURES}"
    return curve("encoder training step", "layers", fixed, RESIDUAL, times), curve(
        "bytes kept by an encoder", "layers", fixed, RESIDUAL, kept, "MB"
    )


def measure_curves(settings: Settings, tick: Callable[[], None] = lambda: None) -> list[Curve]:
    """All curves; every third point where ``settings`` ask for fewer repetitions than a figure to quote needs."""
    step = 1 if settings.minimum >= 7 else 3
    found = [
        gates_curve(axis, backward, sizes[::step], settings, tick)
        for axis, sizes in (("tokens", TOKENS), ("width", WIDTHS))
        for backward in (False, True)
    ]
    return [*found, threads_curve(settings, tick), *depth_curves(DEPTHS[::step], settings, tick)]


def gates_problem(rows: int, features: int, compiled: Compiled) -> Problem:
    """One point of the curves as a row of its own, for pytest: gates forward + backward."""
    row = Row("scaling", "gates forward + backward", "fp32", f"N={rows} D={features}", "ms", against="copy of the same bytes")
    size = gates.moved_bytes(rows, features, torch.float32, gates.FORWARD_ELEMENTS + gates.BACKWARD_ELEMENTS)
    runs, flops = gates_runs(rows, features, backward=True), gates.operations(rows, features, backward=True)
    targets = [Target("eager", "speedup"), Target("against", "share")]
    return Problem(row, runs, targets, 0.5, moved_bytes=size, flops=flops, floor="against")


def depth_problem(layers: int, compiled: Compiled) -> Problem:
    """One point of the curves as a row of its own, for pytest: the training step of an encoder."""
    x, cotangent = torch.randn(BATCH, LENGTH, LAYER_FEATURES, requires_grad=True), torch.randn(BATCH, LENGTH, LAYER_FEATURES)
    size = f"{layers} layers, {BATCH}x{LENGTH} D={LAYER_FEATURES}"
    row = Row("scaling", "encoder training step", "fp32", size, "ms", against=RESIDUAL)
    runs: Runs = {name: lambda m=module: encoder_step(m, x, cotangent) for name, module in encoders(layers).items()}  # type: ignore[misc]
    flops = layers * matrix_products.training_flops(matrix_products.encoder_layer(BATCH, LENGTH, LAYER_FEATURES, LAYER_HEADS))
    return Problem(row, runs, [Target("eager", "speedup"), Target("against", "ratio")], 1.0, flops=flops)


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {
    **{f"{rows} tokens": functools.partial(gates_problem, rows, FEATURES) for rows in TOKENS},
    **{f"{features} features": functools.partial(gates_problem, ROWS, features) for features in WIDTHS},
    **{f"{layers} layers": functools.partial(depth_problem, layers) for layers in DEPTHS},
}


def points_in(settings: Settings) -> int:
    """How often ``measure_curves`` calls its ``tick``."""
    step = 1 if settings.minimum >= 7 else 3
    return 2 * (len(TOKENS[::step]) + len(WIDTHS[::step])) + len(DEPTHS[::step]) + len(thread_counts())


def number(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def markdown(curves: Sequence[Curve]) -> str:
    """A table for each curve, and where it is not straight."""
    names = {"fused": "fused", "eager": "eager"}
    parts = []
    for found in curves:
        sides = [side for side in ("fused", "against", "eager") if side in found["points"][0]["values"]]
        heads = [f"{names.get(side, found['against'])}, {found['unit']}" for side in sides]
        lines = [f"#### {found['name']} over {found['axis']} ({found['fixed']})", ""]
        lines += ["| " + " | ".join([found["axis"], *heads, "fused in units of the rival"]) + " |", "|" + "---:|" * (len(sides) + 2)]
        for entry in found["points"]:
            values = {side: entry["values"][side]["median"] for side in sides if side in entry["values"]}
            cells = [f"{entry['x']:,}", *(number(values[side]) if side in values else "-" for side in sides)]
            lines.append("| " + " | ".join([*cells, f"{values['fused'] / values['against']:.2f}"]) + " |")
        lines += ["", *bends(found)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def bends(found: Curve) -> list[str]:
    """What the lines of a curve say, one line a contestant."""
    lines, one = [], {"tokens": "token", "width": "feature", "layers": "layer"}[found["axis"]] if found["lines"] else ""
    for side, line in found["lines"].items():
        who = found["against"] if side == "against" else side
        bent = ", ".join(f"{part:.2f} times the line at {int(x):,}" for x, part in line["bent"].items())
        cost = f"{number(line['fixed'])} {found['unit']} and {number(line['slope'])} {found['unit']} a {one}"
        lines.append(f"- {who}: {cost}; {'not linear: ' + bent if bent else f'within {BEND:.0%} of that everywhere'}")
    return lines
