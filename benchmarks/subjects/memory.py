"""Bytes kept for the backward pass, by a cell and by an encoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.compiled import Compiled, reference_cell
from ..measure.problems import KeptProblem, Problem, Runs, fill_kept
from ..measure.rows import Row
from . import cell, layer
from .gates import FEATURES, ROWS

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


def kept_row(name: str, dtype: str, size: str, against: str) -> Row:
    """A row on bytes, still without them."""
    row = Row("memory", name, dtype, size, "MB", against=against)
    row.note = "kept for backward, without parameters, with inputs that are kept"
    return row


def bytes_row(name: str, size: str, found: dict[str, int], column: str, target: float, against: str = "", dtype: str = "fp32") -> Row:
    """A row on the bytes ``found``, those of "fused" held to at most ``target`` times those of ``column``."""
    return fill_kept(kept_row(name, dtype, size, against), found, column, target)


def cell_runs(
    rows: int, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", beside: bool = False
) -> tuple[Runs, dict[str, list[Tensor]]]:
    """Forward calls of the reference cell and the fused one, and the parameters of each."""
    leaves = [tensor.requires_grad_() for tensor in cell.make_inputs(rows, features, dtype, device, beside)]
    runs: Runs = {"eager": lambda: reference_cell(*leaves), "fused": lambda: dl.depth_lstm_cell(*leaves)}
    return runs, dict.fromkeys(runs, leaves[3:])


def layer_runs(
    batch: int, length: int, features: int, heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Runs, dict[str, list[Tensor]]]:
    """Forward calls of the reference layer, the fused one and torch's residual one, and the parameters of each."""
    h, c = (torch.randn(batch, length, features, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    layers = layer.depth_lstm_layers(features, heads, dtype, device)
    residual = layer.residual_layer(features, heads, dtype, device)
    runs: Runs = {"eager": lambda: layers["eager"](h, c), "fused": lambda: layers["fused"](h, c), "against": lambda: residual(h)}
    return runs, {name: list(module.parameters()) for name, module in (*layers.items(), ("against", residual))}


def kept_by(runs: Runs, parameters: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes that each run keeps."""
    return {name: kept_bytes(run, parameters[name]) for name, run in runs.items()}


def cell_bytes(
    rows: int, features: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", beside: bool = False
) -> dict[str, int]:
    """Bytes kept by the reference cell and by the fused one, for rows x features."""
    return kept_by(*cell_runs(rows, features, dtype, device, beside))


def layer_bytes(
    batch: int, length: int, features: int, heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, int]:
    """Bytes kept by the reference layer, the fused one and torch's residual one."""
    return kept_by(*layer_runs(batch, length, features, heads, dtype, device))


def kept_problem(
    name: str, size: str, found: tuple[Runs, dict[str, list[Tensor]]], share: tuple[str, float], against: str = ""
) -> KeptProblem:
    kept = kept_by(*found)
    return KeptProblem(kept_row(name, "fp32", size, against), found[0], kept=kept, share=share)


def cell_memory(compiled: Compiled) -> Problem:
    return kept_problem("bytes kept by a cell", f"N={ROWS} I=D={FEATURES}", cell_runs(ROWS, FEATURES), ("eager", CELL_SHARE))


def layer_memory(compiled: Compiled) -> Problem:
    runs = layer_runs(layer.BATCH, layer.LENGTH, layer.FEATURES, layer.HEADS)
    size = f"{layer.BATCH}x{layer.LENGTH} D={layer.FEATURES}"
    return kept_problem("bytes kept by a layer", size, runs, ("against", LAYER_SHARE), layer.RESIDUAL)


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {"cell": cell_memory, "layer": layer_memory}
