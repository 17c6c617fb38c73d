"""Bytes kept for the backward pass, by a cell and by an encoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.calls import Runs, name_of
from ..measure.kept import kept_bytes
from ..measure.place import Place
from ..measure.problems import KeptProblem, Subject
from ..measure.rows import Row
from . import cell, layer

CELL_SHARE, LAYER_SHARE = 0.45, 0.75
NOTE = "kept for backward, without parameters, with inputs that are kept"


def kept_by(runs: Runs, parameters: Mapping[str, Sequence[Tensor]], others: Sequence[Tensor]) -> dict[str, int]:
    """Return the bytes that each run keeps; runs that ``parameters`` does not name have the parameters ``others``."""
    return {name: kept_bytes(run, parameters.get(name, others)) for name, run in runs.items()}


def cell_memory(
    place: Place,
    dtype: torch.dtype = torch.float32,
    rows: int = cell.ROWS,
    features: int = cell.FEATURES,
    beside: bool = False,
) -> KeptProblem:
    """Make the problem: forward calls of the reference cell and the fused one."""
    leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, dtype, place.device, beside)]
    runs: Runs = {"eager": lambda: cell.reference_cell(*leaves), **place.fused(lambda: dl.depth_lstm_cell(*leaves))}
    row = Row("memory", "bytes kept by a cell", name_of(dtype), f"N={rows} I=D={features}", "MB", note=NOTE)
    return KeptProblem(row, runs, kept=kept_by(runs, {}, leaves[3:]), share=("eager", CELL_SHARE), place=place)


def layer_memory(
    place: Place,
    dtype: torch.dtype = torch.float32,
    features: int = layer.FEATURES,
    heads: int = layer.HEADS,
    batch: int = layer.BATCH,
    length: int = layer.LENGTH,
) -> KeptProblem:
    """Make the problem: forward calls of the reference layer, the fused one and torch's residual one."""
    h, c = (
        torch.randn(batch, length, features, dtype=dtype, device=place.device, requires_grad=True) for _ in range(2)
    )
    layers = layer.depth_lstm_layers(features, heads, dtype, place.device)
    residual = layer.residual_layer(features, heads, dtype, place.device)
    runs: Runs = {"eager": lambda: layers["eager"](h, c), **place.fused(lambda: layers["fused"](h, c))}
    runs["against"] = lambda: residual(h)
    rivals = {"eager": list(layers["eager"].parameters()), "against": list(residual.parameters())}
    kept = kept_by(runs, rivals, list(layers["fused"].parameters()))
    size = f"{batch}x{length} D={features}"
    row = Row("memory", "bytes kept by a layer", name_of(dtype), size, "MB", against=layer.RESIDUAL, note=NOTE)
    return KeptProblem(row, runs, kept=kept, share=("against", LAYER_SHARE), place=place)


SUBJECT = Subject(
    "memory", {"cell": cell_memory, "layer": layer_memory}, needs=("cell", "layer"), ticks=lambda settings: 2
)
