"""The problems that `make gpu` measures, with the checks that they need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..measure.rows import Row
from ..subjects import cell, decoding, gates, latency, layer, memory, overhead
from .bench import BF16, FP32, Bench

AUTOTUNE = "max-autotune-no-cudagraphs"  # with CUDA graphs every call would copy its inputs first


def gates_rows(
    bench: Bench, features: int, rows: int, dtype: torch.dtype, compile: bool = True, mode: str | None = None
) -> Iterator[Row]:
    """Yield forward, then forward + backward with every gradient.

    With a ``mode`` of torch.compile its result is the only rival.
    """
    for make in (gates.forward, gates.training):
        maker = partial(make, dtype=dtype, rows=rows, features=features)
        yield from bench.rows(maker, ("gates", dtype, features), compile, mode)


def cell_rows(bench: Bench, features: int, rows: int, beside: bool, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """Yield the cell, forward + backward.

    With ``beside`` x and h are halves of one matrix, as between layers.
    """
    maker = partial(cell.training, dtype=dtype, rows=rows, features=features, beside=beside)
    yield from bench.rows(maker, ("cell beside" if beside else "cell", dtype, features))


def layer_rows(
    bench: Bench, features: int, heads: int, batch: int, length: int, compile: bool, dtype: torch.dtype = BF16
) -> Iterator[Row]:
    """Yield a training step of an encoder layer; with ``compile`` all contestants are compiled."""
    maker = partial(layer.training, dtype=dtype, features=features, heads=heads, batch=batch, length=length)
    yield from bench.rows(partial(maker, all_compiled=compile), ("layer", dtype, features))


def stack_rows(
    bench: Bench, features: int, heads: int, batch: int, length: int, layers: int, dtype: torch.dtype = BF16
) -> Iterator[Row]:
    """Yield a training step of a whole encoder."""
    maker = partial(layer.stack, dtype=dtype, features=features, heads=heads, batch=batch, length=length)
    yield from bench.rows(partial(maker, layers=layers), ("layer", dtype, features))


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Yield the bytes kept for backward, counted by saved-tensor hooks.

    ``numbers`` also has the allocator's count, outputs included.
    """
    features, rows = bench.sizes.memory
    maker = partial(memory.cell_memory, dtype=BF16, rows=rows, features=features, beside=True)
    yield from bench.rows(maker, ("cell beside", BF16, features))
    width, heads, batch, length = bench.sizes.layers[0]
    layers = partial(memory.layer_memory, dtype=BF16, features=width, heads=heads, batch=batch, length=length)
    yield from bench.rows(layers, ("layer", BF16, width))


def overhead_rows(bench: Bench) -> Iterator[Row]:
    """Yield the host time of a gates call on tiny tensors, without and with gradients."""
    for grad in overhead.MICROSECONDS:
        maker = partial(overhead.one_call, grad=grad, calls=bench.sizes.calls)
        yield from bench.rows(maker, ("gates", FP32, overhead.FEATURES))


def decoding_rows(bench: Bench, batch: int, beams: int) -> Iterator[Row]:
    """Yield tokens a second of a search whose steps are CUDA graphs."""
    features, heads, layers, vocabulary = bench.sizes.decoding
    maker = partial(decoding.captured_decoding, features=features, heads=heads, layers=layers, vocabulary=vocabulary)
    yield from bench.rows(partial(maker, batch=batch, beams=beams), ("gates", FP32, features), compile=False)


def few_rows(bench: Bench, rows: int, dtype: torch.dtype = BF16) -> Iterator[Row]:
    """Yield the time from a call on few rows until it is done.

    The calls are plain calls, then CUDA graphs; torch.compile captures its own.
    """
    features = bench.sizes.few[0]
    maker = partial(latency.few_rows, dtype=dtype, rows=rows, features=features)
    for mode in (None, latency.GRAPHS):
        yield from bench.rows(maker, ("gates", dtype, features), mode=mode)
