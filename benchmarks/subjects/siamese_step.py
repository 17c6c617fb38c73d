"""The step of SiameseNorm's two streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure import steps

NAMES = ("x", "y", "o", "weight_x", "bias_x", "weight_y", "bias_y", "weight", "bias")


def fused(*inputs: Tensor) -> tuple[Tensor, ...]:
    return dl.siamese_step(*inputs, c=2.0)


def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    return dl.reference.siamese_step(*inputs, c=2.0)


def make_inputs(rows: int, features: int, dtype: torch.dtype, device: Any) -> list[Tensor]:
    return [*steps.rows_of(3, rows, features, dtype, device), *steps.affines(3, features, dtype, device)]


STEP = steps.Step(
    "siamese_step",
    "siamese",
    fused,
    reference,
    make_inputs,
    (NAMES, ("X'", "Y'", "u")),
    forward=6,  # X, Y, o; X', Y', u
    backward=9,  # X, Y, o and three gradients; three gradients
    speedup=2.5,
)
SUBJECT = steps.subject("siamese_step", [STEP])
