"""Calls of one instruction set's kernels through tests/_internals.

They bypass csrc/depth_lstm/cpu_op.cpp, work on any memory, and are streamed or not.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_calls import GatesCall, Rows
from helpers import BF16, F16, F32, F64
from torch import Tensor

from depthlstm_fast.checks import ACTIVATIONS, NORMS

internals = pytest.importorskip("_internals", reason="tests/_internals is not built (make internals)")

DTYPES = {F32: 0, F64: 1, BF16: 2, F16: 3}  # csrc/common/types.h
GIVEN = len(ACTIVATIONS)
MARGIN, CANARY = 4096, 0xA5


def _runs(isa: str) -> bool:
    nothing = GatesCall(features=1)
    try:
        internals.run(isa, ctypes.addressof(nothing), 1)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in ("generic", "avx2", "avx512", "avx512_bf16") if _runs(isa)]
# Above this traffic csrc/depth_lstm/cpu_op.cpp writes the outputs past the caches.
_source = (Path(__file__).resolve().parents[3] / "csrc" / "depth_lstm" / "cpu_op.cpp").read_text(encoding="utf-8")
STREAM_BYTES = int(re.search(r"stream_bytes = int64_t\((\d+)\) << 20;", _source).group(1)) << 20  # type: ignore[union-attr]


class Memory:
    """A tensor ``shift`` elements after a 64-byte boundary, between bytes that must stay unwritten."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self.room = torch.full((size + 2 * MARGIN + 64,), CANARY, dtype=torch.uint8)
        self.first = MARGIN + -(self.room.data_ptr() + MARGIN) % 64 + shift * dtype.itemsize
        self.last = self.first + size
        self.tensor = self.room[self.first : self.last].view(dtype).view(shape)
        self.tensor.fill_(torch.nan)

    def intact(self) -> bool:
        return bool((self.room[: self.first] == CANARY).all() and (self.room[self.last :] == CANARY).all())


def _rows(tensor: Tensor) -> Rows:
    assert tensor.dim() == 2
    assert tensor.stride(1) == 1
    return Rows(tensor.data_ptr(), tensor.stride(0))


def run(
    isa: str,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grads: tuple[Tensor, Tensor] | None = None,
    *,
    stream: bool = False,
    shift: int = 0,
    chunk_rows: int = 1 << 40,
    place: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the result of ``helpers.results`` from the kernels of ``isa``; without grads h and c_out alone.

    tensors: z, c, hidden (rows, ...), weight, bias, z_bias; options: norm, activation, eps, dropout_p, seed (an int).
    place: replaces each output tensor by rows of other memory, with the same shape and dtype.
    """
    z, c = tensors["z"], tensors["c"]
    rows, features = c.shape
    affine, z_bias = tensors.get("weight"), tensors.get("z_bias")
    call = GatesCall(
        rows=rows,
        features=features,
        z_dtype=DTYPES[z.dtype],
        c_dtype=DTYPES[c.dtype],
        affine_dtype=DTYPES[z.dtype if affine is None else affine.dtype],
        z_bias_dtype=DTYPES[z.dtype if z_bias is None else z_bias.dtype],
        norm=NORMS.index(options.get("norm", "gate")),
        activation=GIVEN if "hidden" in tensors else ACTIVATIONS.index(options.get("activation", "gelu")),
        eps=options.get("eps", 1e-6),
        dropout_p=options.get("dropout_p", 0.0),
        seed=options.get("seed", 0),
        stream=stream,
        **{name: _rows(tensors[name]) for name in ("z", "hidden", "c") if name in tensors},
        **{name: tensors[name].data_ptr() for name in ("z_bias", "weight", "bias") if name in tensors},
    )
    kept: list[Memory] = []

    def output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = Memory(shape, dtype, shift)
        kept.append(memory)
        return memory.tensor if place is None or shape[0] != rows else place(memory.tensor)

    outputs = {"h": output((rows, features), z.dtype), "c_out": output((rows, features), c.dtype)}
    call.h, call.c_out = _rows(outputs["h"]), _rows(outputs["c_out"])
    internals.run(isa, ctypes.addressof(call), chunk_rows)
    if grads is not None:
        call.h, call.c_out, call.dh, call.dc = Rows(), Rows(), _rows(grads[0]), _rows(grads[1])
        for name, tensor in tensors.items():
            made = outputs[f"d{name}"] = output(tuple(tensor.shape), tensor.dtype)
            by_row = name in ("z", "hidden", "c")
            setattr(call, "dc_in" if name == "c" else f"d{name}", _rows(made) if by_row else made.data_ptr())
        internals.run(isa, ctypes.addressof(call), chunk_rows)
    assert all(memory.intact() for memory in kept)
    return outputs
