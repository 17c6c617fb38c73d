"""Bytes kept for the backward pass, by a cell and by an encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.bench import cell, layer
from depthlstm_fast.bench.compiled import Compiled, reference_cell
from depthlstm_fast.bench.gates import FEATURES, ROWS
from depthlstm_fast.bench.rows import Figure, Row, Settings
from depthlstm_fast.bench.timing import Spread

CELL_SHARE, LAYER_SHARE = 0.45, 0.75


def kept_bytes(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages that ``run`` saves for backward, parameters left out, inputs that are kept counted."""
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    # the graph held every saved tensor until here, so that no address was used twice
    del outputs
    return sum(kept.values())


def bytes_row(name: str, size: str, found: dict[str, int], column: str, target: float, against: str = "", dtype: str = "fp32") -> Row:
    """A row on the bytes ``found``, those of "fused" held to at most ``target`` times those of ``column``."""
    row = Row("memory", name, dtype, size, "MB", repetitions=1, against=against)
    row.values = {side: Spread(*(count / 1e6,) * 3) for side, count in found.items()}
    share = found["fused"] / found[column]
    row.figures = [Figure(column, "ratio", share, share, share, target, "at most")]
    row.note = "kept for backward, without parameters, with inputs that are kept"
    return row


def cell_bytes(
    rows: int, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", beside: bool = False
) -> dict[str, int]:
    """Bytes kept by the reference cell and by the fused one, for rows x features."""
    leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, dtype, device, beside)]
    return {
        "eager": kept_bytes(lambda: reference_cell(*leaves), leaves[3:]),
        "fused": kept_bytes(lambda: dl.depth_lstm_cell(*leaves), leaves[3:]),
    }


def layer_bytes(
    batch: int, length: int, features: int, heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, int]:
    """Bytes kept by the reference layer, the fused one and torch's residual one."""
    h, c = (torch.randn(batch, length, features, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    found = {
        name: kept_bytes(lambda module=module: module(h, c), module.parameters())  # type: ignore[misc]
        for name, module in layer.depth_lstm_layers(features, heads, dtype, device).items()
    }
    residual = layer.residual_layer(features, heads, dtype, device)
    return found | {"against": kept_bytes(lambda: residual(h), residual.parameters())}


def measure(settings: Settings, compiled: Compiled, tick: Callable[[], None]) -> Iterator[Row]:
    """One row for the cell, one for the encoder layer."""
    yield bytes_row("bytes kept by a cell", f"N={ROWS} I=D={FEATURES}", cell_bytes(ROWS, FEATURES), "eager", CELL_SHARE)
    tick()
    found = layer_bytes(layer.BATCH, layer.LENGTH, layer.FEATURES, layer.HEADS)
    size = f"{layer.BATCH}x{layer.LENGTH} D={layer.FEATURES}"
    yield bytes_row("bytes kept by a layer", size, found, "against", LAYER_SHARE, layer.RESIDUAL)
    tick()
