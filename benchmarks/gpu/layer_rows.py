"""Rows of `make gpu` on layers and encoders against torch's residual ones, and the bytes that cells and layers keep for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy
from ..measure.compiled import reference_cell
from ..measure.gpu_timing import allocated_bytes
from ..measure.rows import Row, Target
from ..subjects import cell, layer, memory
from ..subjects.gates import name_of
from .bench import BF16, Bench, Runs

LAYER_RATIO = 0.95
COMPILED_DIFFERENCE = 0.02  # compiled against eager bf16, ||difference|| / ||eager||


def on_backend(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` with ``backend`` for the calls that name none."""

    def call() -> object:
        with dl.use_backend(backend):
            return run()

    return call


def difference(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest ||found - wanted|| / ||wanted|| of the pairs; NaN counts as infinite."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        norm = float(other.double().norm())
        error = float((one.double() - other.double()).norm()) / max(norm, 1e-30)
        worst = max(worst, error if error < float("inf") else float("inf"))
    return worst


def layer_rows(bench: Bench, features: int, heads: int, batch: int, length: int, compile: bool, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """A training step of an encoder layer; with ``compile`` all contestants are compiled."""
    bench.reset()
    name, size = "encoder layer step" + (", all compiled" if compile else ""), f"{batch}x{length} D={features}"
    timed, red = bench.split(lambda: Row("layer", name, name_of(dtype), size, "ms", against=layer.RESIDUAL), "layer", dtype, features)
    yield from red
    if not timed:
        return
    h, c = (torch.randn(batch, length, features, device=bench.device).to(dtype).requires_grad_() for _ in range(2))
    cotangents = [torch.randn_like(h) for _ in range(2)]
    layers = layer.depth_lstm_layers(features, heads, dtype, bench.device)
    residual = layer.residual_layer(features, heads, dtype, bench.device)
    if layer.matrix_entries(residual) != layer.matrix_entries(layers["fused"]):
        raise ValueError("layers of unequal size")

    def prepared(module: nn.Module) -> Callable[..., Any]:
        return torch.compile(module, dynamic=False) if compile else module

    def stepping(module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        call, parameters = prepared(module), list(module.parameters())
        return lambda: torch.autograd.grad(call(h, c), [h, c, *parameters], cotangents)

    runs: Runs = {"compile" if compile else "eager": stepping(layers["eager"])}
    step, rival, weights = stepping(layers["fused"]), prepared(residual), list(residual.parameters())
    for backend in list(timed):
        runs[backend] = on_backend(backend, step)
        if compile:
            plain = on_backend(backend, lambda: layer.depth_lstm_step(layers["fused"], h, c, cotangents))()
            error = difference(runs[backend](), plain)  # type: ignore[arg-type]
            made = accuracy.Check(
                "layer", name_of(dtype), error <= COMPILED_DIFFERENCE, "compiled against eager:", error, 0.0, 0.0, backend
            )
            bench.checker.on_check(made)
            if not made.passed:
                timed[backend].failure = f"layer {made.dtype} {size} {made.summary}"
                yield timed.pop(backend)
                del runs[backend]
    if not timed:
        return
    runs["against"] = lambda: torch.autograd.grad(rival(h), [h, *weights], cotangents[0])
    targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", LAYER_RATIO)]
    yield from bench.time(timed, runs, targets, 1.5)


def stack_rows(bench: Bench, features: int, heads: int, batch: int, length: int, layers: int, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """A training step of a whole encoder, where each layer's input is written beside the state."""
    bench.reset()
    timed, red = bench.split(
        lambda: Row("layer", f"encoder of {layers} layers, step", name_of(dtype), f"{batch}x{length} D={features}", "ms"),
        *("layer", dtype, features),
    )
    yield from red
    if not timed:
        return
    modules = layer.depth_lstm_layers(features, heads, dtype, bench.device)
    eager = dl.reference.DepthLSTMEncoder(modules["eager"], layers)  # type: ignore[arg-type]
    fused = dl.DepthLSTMEncoder(modules["fused"], layers)  # type: ignore[arg-type]
    fused.load_state_dict(eager.state_dict())
    residual = nn.TransformerEncoder(layer.residual_layer(features, heads, dtype, bench.device), layers, enable_nested_tensor=False)
    source = torch.randn(batch, length, features, device=bench.device).to(dtype).requires_grad_()
    cotangent = torch.randn_like(source)

    def step(module: nn.Module) -> object:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.autograd.grad(module(source), [source, *parameters], cotangent, allow_unused=True)

    runs: Runs = {"eager": lambda: step(eager), "against": lambda: step(residual)}
    for backend, row in timed.items():
        row.against = "nn.TransformerEncoder"
        runs[backend] = on_backend(backend, lambda: step(fused))
    targets = [Target("eager", "speedup"), Target("against", "ratio", LAYER_RATIO)]
    yield from bench.time(timed, runs, targets, 1.5)


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Bytes kept for backward, through saved-tensor hooks, and in ``numbers`` what the allocator says, outputs included."""
    bench.reset()
    features, rows = bench.sizes.memory
    width, heads, batch, length = bench.sizes.layers[0]
    for backend in bench.backends:
        with dl.use_backend(backend):
            found = memory.cell_bytes(rows, features, BF16, bench.device, beside=True)
            row = memory.bytes_row("bytes kept by a cell", f"N={rows} I=D={features}", found, "eager", memory.CELL_SHARE, dtype="bf16")
            leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, BF16, bench.device, beside=True)]
            for name, function in (("eager", reference_cell), ("fused", dl.depth_lstm_cell)):
                count = allocated_bytes(functools.partial(function, *leaves), bench.device)
                row.numbers[f"allocated_{name}_mb"] = count / 1e6
            row.backend, row.failure = backend, bench.checker.failure("cell beside", backend, BF16, features)
            yield row

            found = memory.layer_bytes(batch, length, width, heads, BF16, bench.device)
            size = f"{batch}x{length} D={width}"
            row = memory.bytes_row("bytes kept by a layer", size, found, "against", memory.LAYER_SHARE, layer.RESIDUAL, "bf16")
            h, c = (torch.randn(batch, length, width, device=bench.device).to(BF16).requires_grad_() for _ in range(2))
            layers = layer.depth_lstm_layers(width, heads, BF16, bench.device)
            residual = layer.residual_layer(width, heads, BF16, bench.device)
            calls: Runs = {name: functools.partial(module, h, c) for name, module in layers.items()}
            for name, call in (calls | {"against": functools.partial(residual, h)}).items():
                row.numbers[f"allocated_{name}_mb"] = allocated_bytes(call, bench.device) / 1e6
            row.backend, row.failure = backend, bench.checker.failure("layer", backend, BF16, width)
            yield row
