"""The step of a residual connection with its norms: pre-norm, post-norm, sandwich-norm, Keel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure import steps

OUTPUTS = ("x'", "u")


class _Call:
    """A placement as a function of x, y and the affines of its norms, in the order of ``norms``."""

    def __init__(self, function: Any, norms: str, a: float) -> None:
        self.function, self.norms, self.a = function, norms, a

    def __call__(self, x: Tensor, y: Tensor, *affines: Tensor) -> tuple[Tensor, ...]:
        named = {f"{name}{n}": affines[2 * i + k] for i, n in enumerate(self.norms) for k, name in enumerate(NAMES)}
        found = self.function(x, y, a=self.a, **named)
        return found if "2" in self.norms else found[:1]


NAMES = ("weight", "bias")


def step(name: str, norms: str, a: float, backward: int, speedup: float) -> steps.Step:
    def inputs(rows: int, features: int, dtype: torch.dtype, device: Any) -> list[Tensor]:
        return [
            *steps.rows_of(2, rows, features, dtype, device),
            *steps.affines(len(norms), features, dtype, device),
        ]

    names = ("x", "y", *(f"{name}{n}" for n in norms for name in NAMES))
    return steps.Step(
        "norm_step",
        name,
        _Call(dl.norm_step, norms, a),
        _Call(dl.reference.norm_step, norms, a),
        inputs,
        (names, OUTPUTS if "2" in norms else OUTPUTS[:1]),
        forward=4 if "2" in norms else 3,  # x, y; x', u
        backward=backward,
        speedup=speedup,
    )


# Backward of pre-norm reads x' and both gradients and writes one, since dx = dy. With N1 it reads x and y as well.
STEPS = [
    step("pre-norm", "2", 1.0, 4, 1.8),
    step("post-norm", "1", 1.0, 4, 1.8),
    step("sandwich-norm", "23", 1.0, 6, 1.8),
    step("keel", "12", 12.0, 6, 2.5),
]
SUBJECT = steps.subject("norm_step", STEPS)
