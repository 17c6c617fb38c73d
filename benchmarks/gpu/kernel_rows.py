"""Rows of `make gpu` on single operators: the gates, the cell, the host's time of a call, few rows. Every backend under test."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import depthlstm_fast as dl

from ..measure.compiled import Compiled, reference_cell, reference_gates
from ..measure.gpu_timing import captured, latencies, synchronize
from ..measure.rows import Figure, Row, Target
from ..measure.timing import Spread, ratio, spread
from ..subjects import cell, gates, overhead
from ..subjects.gates import forward_and_backward, moved_bytes, name_of
from .bench import BF16, FP32, Bench, Runs

MAIN = (512, 1024, 2048)  # the widths that the targets name
SHARE_OF_COPY = 0.85
SPEEDUPS = {"forward": (6.0, 1.3), "forward + backward": (6.0, 1.5)}  # over eager, over torch.compile
GEMM_UNITS = {512: 1.25, 1024: 1.12}
AUTOTUNE = "max-autotune-no-cudagraphs"  # with CUDA graphs every call would copy its inputs first


def gates_rows(bench: Bench, features: int, rows: int, dtype: torch.dtype, compile: bool = True, mode: str | None = None) -> Iterator[Row]:
    """Forward, then forward + backward with every gradient. With a ``mode`` of torch.compile that alone is the rival."""
    bench.reset()
    name, size = "gates {}" if mode is None else "gates {}, max-autotune", f"N={rows} D={features}"

    def blank(what: str, elements: int) -> Row:
        row = Row("gates", name.format(what), name_of(dtype), size, "ms", against=f"copy of {elements}D")
        row.note = f"{moved_bytes(rows, features, dtype, elements) / 1e6:.1f} MB moved"
        return row

    forward, both = gates.FORWARD_ELEMENTS, gates.FORWARD_ELEMENTS + gates.BACKWARD_ELEMENTS
    timed, red = bench.split(lambda: blank("forward", forward), "gates", dtype, features)
    trained, red_too = bench.split(lambda: blank("forward + backward", both), "gates", dtype, features)
    yield from red
    yield from red_too
    if not timed:
        return
    inputs = gates.make_inputs(rows, features, dtype, bench.device)
    for backend in list(timed):
        timed[backend].failure = bench.checker.last_rows(backend, inputs, min(64, rows))
        if timed[backend].failure is not None:
            trained[backend].failure = timed[backend].failure
            yield timed.pop(backend)
            yield trained.pop(backend)
    if not timed:
        return
    source = torch.randn(rows * features * 6, device=bench.device).to(dtype)
    halves = [rows * features * elements // 2 for elements in (forward, gates.BACKWARD_ELEMENTS)]
    copies = [gates.copy_once(source, half) for half in halves]
    compiled = Compiled(bench.settings.compile and compile, mode)
    fused = {backend: functools.partial(dl.depth_lstm_gates, backend=backend) for backend in timed}
    main = features in MAIN and dtype == BF16

    def targets(what: str, share: float | None) -> list[Target]:
        eager, rival = SPEEDUPS[what] if main and mode is None else (None, None)
        return [Target("eager", "speedup", eager), Target("compile", "speedup", rival), Target("against", "share", share)]

    def speeds(found: list[Row], elements: int) -> Iterator[Row]:
        size = moved_bytes(rows, features, dtype, elements)
        for row in found:
            row.numbers["gb_per_s"] = size / row.values["fused"].median / 1e6
            row.numbers["copy_gb_per_s"] = size / row.values["against"].median / 1e6
            if compiled.reason is not None:
                row.missing["compile"] = compiled.reason
            yield row

    with torch.no_grad():
        runs: Runs = {} if mode else {"eager": lambda: reference_gates(*inputs)}
        infer = compiled.get(reference_gates, lambda function: function(*inputs))
        if infer is not None:
            runs["compile"] = lambda: infer(*inputs)
        runs |= {backend: functools.partial(function, *inputs) for backend, function in fused.items()}
        found = bench.time(timed, runs | {"against": copies[0]}, targets("forward", SHARE_OF_COPY if main and mode is None else None), 0.7)
    yield from speeds(found, forward)

    leaves = [tensor.requires_grad_() for tensor in inputs]
    cotangents = [torch.randn_like(inputs[1]) for _ in range(2)]

    def step(function: gates.Function) -> object:
        return forward_and_backward(function, leaves, cotangents)

    runs = {} if mode else {"eager": lambda: step(reference_gates)}
    train = compiled.get(reference_gates, step)
    if train is not None:
        runs["compile"] = lambda: step(train)
    runs |= {backend: functools.partial(step, function) for backend, function in fused.items()}
    runs["against"] = lambda: [copy() for copy in copies]
    yield from speeds(bench.time(trained, runs, targets("forward + backward", None), 1.0), both)


def cell_rows(bench: Bench, features: int, rows: int, beside: bool, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """The cell, forward + backward with every gradient; with ``beside`` x and h are halves of one matrix, as between layers."""
    bench.reset()
    name = "cell forward + backward" + (", x beside h" if beside else "")
    size = f"N={rows} I=D={features}"
    timed, red = bench.split(
        lambda: Row("cell", name, name_of(dtype), size, "ms", against="3 bare GEMMs"), "cell beside" if beside else "cell", dtype, features
    )
    yield from red
    if not timed:
        return
    leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, dtype, bench.device, beside)]
    cotangents = [torch.randn(rows, features, device=bench.device).to(dtype) for _ in range(2)]

    def step(function: gates.Function) -> object:
        return forward_and_backward(function, leaves, cotangents)

    compiled = Compiled(bench.settings.compile)
    train = compiled.get(reference_cell, step)
    runs: Runs = {"eager": lambda: step(reference_cell)}
    if train is not None:
        runs["compile"] = lambda: step(train)
    runs |= {backend: functools.partial(step, functools.partial(dl.depth_lstm_cell, backend=backend)) for backend in timed}
    runs["against"] = cell.bare_gemms(rows, features, dtype, bench.device)
    targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", GEMM_UNITS.get(features))]
    for row in bench.time(timed, runs, targets, 1.0):
        if compiled.reason is not None:
            row.missing["compile"] = compiled.reason
        yield row


def overhead_rows(bench: Bench) -> Iterator[Row]:
    """Host time of a gates call on tiny tensors, without and with gradients."""
    bench.reset()
    features = overhead.FEATURES
    for grad, target in overhead.MICROSECONDS.items():
        inputs = [tensor.requires_grad_(grad) for tensor in gates.make_inputs(overhead.ROWS, features, FP32, bench.device)]
        failures = {backend: bench.checker.failure("gates", backend, FP32, features) for backend in bench.backends}
        runs: Runs = {"eager": lambda i=inputs: reference_gates(*i)}  # type: ignore[misc]
        for backend, failure in failures.items():
            if failure is None:
                runs[backend] = lambda i=inputs, b=backend: dl.depth_lstm_gates(*i, backend=b)  # type: ignore[misc]
        with torch.set_grad_enabled(grad):
            for run in runs.values():
                run()
            best = overhead.best_batches(
                runs, bench.sizes.batches, bench.sizes.calls, lambda: None, functools.partial(synchronize, bench.device)
            )
        for backend, failure in failures.items():
            note = f"best median of {bench.sizes.batches} batches of {bench.sizes.calls} calls"
            row = overhead.overhead_row(grad, best["eager"], best["eager" if failure else backend], target, note)
            row.backend, row.failure = backend, failure
            yield row


def few_rows(bench: Bench, rows: int, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """The time from a call on few rows until it is done: as plain calls, then as CUDA graphs (torch.compile with its own)."""
    bench.reset()
    features = bench.sizes.few[0]
    inputs = gates.make_inputs(rows, features, dtype, bench.device)

    def three_times(function: gates.Function) -> None:
        for _ in range(3):  # a run, a recording, a replay; nothing may hold the outputs meanwhile
            function(*inputs)

    for graphs in (False, True):
        name = "few rows, CUDA graph" if graphs else "few rows, plain call"
        size = f"N={rows} D={features}"

        def blank(name: str = name, size: str = size) -> Row:
            return Row("latency", name, name_of(dtype), size, "us")

        timed, red = bench.split(blank, "gates", dtype, features)
        yield from red
        if not timed:
            continue
        compiled = Compiled(bench.settings.compile, "reduce-overhead" if graphs else None)
        with torch.no_grad():
            rival = compiled.get(reference_gates, three_times)
            runs: Runs = {"eager": functools.partial(reference_gates, *inputs)}
            runs |= {backend: functools.partial(dl.depth_lstm_gates, *inputs, backend=backend) for backend in timed}
            if graphs:
                runs = {key: captured(run, bench.device) for key, run in runs.items()}
            if rival is not None:
                runs["compile"] = functools.partial(rival, *inputs)
            samples = latencies(runs, bench.device, bench.sizes.latencies)
        for backend, row in timed.items():
            row.repetitions = len(samples[backend])
            row.values = {key: spread(samples[key], 1e6) for key in ("eager", "compile") if key in samples}
            row.values["fused"] = spread(samples[backend], 1e6)
            for key in ("eager", "compile"):
                if key in samples:
                    found: Spread = ratio(samples[key], samples[backend])
                    row.figures.append(Figure(key, "speedup", found.median, found.p10, found.p90))
            if compiled.reason is not None:
                row.missing["compile"] = compiled.reason
            row.note = "from the call until the GPU is done"
            yield row
