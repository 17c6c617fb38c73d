"""The statistics of 16-bit rows in one pass, on rows made against them: see csrc/depth_lstm/cpu_row.h.

c and the affine are fp32, so that c' shows the normalised values unrounded.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import BF16, F16, needs_cpp, normal
from torch import Tensor

from depthlstm_fast.checks import ACTIVATIONS

pytestmark = needs_cpp

# A mean, the longest vector and beyond: 4 lanes in generic code, 8 with AVX2, 16 with AVX-512.
FIRST = [1, 4, 8, 16, 40]


def far(ratio: float) -> Callable[[int], Tensor]:
    return lambda features: normal(4, features) + ratio


def first_outliers(count: int, distance: float) -> Callable[[int], Tensor]:
    """Return rows whose first values hold all of the variance: the factor 1 + D / m of the one pass."""

    def rows(features: int) -> Tensor:
        values = normal(4, features)
        values[:, :count] += distance
        return values

    return rows


def outlier(place: float, base: float, step: float) -> Callable[[int], Tensor]:
    """Return constant rows with one value a little or far off."""

    def rows(features: int) -> Tensor:
        values = torch.full((4, features), base)
        values[:, min(int(place * features), features - 1)] += step
        return values

    return rows


def constant(value: float) -> Callable[[int], Tensor]:
    return lambda features: torch.full((4, features), value)


def between_gates(features: int) -> Tensor:
    """Return gates that are constant, and far from each other under a joint norm."""
    return torch.tensor([-3e4, 0.0, 1.0, 6e4]).unsqueeze(1).expand(4, features)


ROWS = {
    **{f"far {ratio:g}": far(ratio) for ratio in (1e2, 1e3, 1e4, 6e4)},
    **{f"first {m} by {s:g}": first_outliers(m, s) for m in FIRST for s in (1e1, 1e3, 3e4)},
    **{f"constant {value:g}": constant(value) for value in (0.0, 0.3, 1000.3, -6.5e4)},
    **{f"nearly constant at {p:g}": outlier(p, 0.5, 2**-7) for p in (0.0, 0.5, 1.0)},
    **{f"nearly 1000 at {p:g}": outlier(p, 1000.0, 8.0) for p in (0.0, 0.5, 1.0)},
    **{f"one far outlier at {p:g}": outlier(p, 0.0, 6e4) for p in (0.0, 0.5, 1.0)},
    "between gates": between_gates,
    "signs": lambda features: normal(4, features).sign() * 6e4,
}


def cell(z: Tensor, c: Tensor, norm: str) -> Tensor:
    over = (0, 1) if norm == "joint" else (1,)
    centred = z - z.mean(over, keepdim=True)
    a = centred / (centred.square().mean(over, keepdim=True) + 1e-6).sqrt()
    return torch.sigmoid(a[1]) * c + torch.sigmoid(a[0]) * torch.tanh(a[3])


@pytest.mark.parametrize("biased", [False, True], ids=["", "z_bias"])
@pytest.mark.parametrize("norm", ["gate", "joint"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("features", [1, 2, 5, 8, 9, 33, 512, 4096, 65536])
def test_rows_made_against_one_pass(features: int, dtype: torch.dtype, norm: str, biased: bool) -> None:
    """Compare with fp64, within what eager fp32 loses in its two passes and a fiftieth of an fp16 rounding.

    A sum of 65,536 terms in 8 lanes may err 128 times as much as one of 512 terms. The allowance is 20 times as large.
    """
    kinds = (("gate", "joint").index(norm), list(ACTIVATIONS).index("tanh"))
    c = torch.randn(features)
    z_bias = torch.randn(4, features) if biased else None
    for name, make in ROWS.items():
        z = make(features).to(dtype)
        _, found = torch.ops.depthlstm_fast.gates_forward(
            z.reshape(1, -1),
            None if z_bias is None else z_bias.flatten(),
            *(None, c.unsqueeze(0), None, None, None),
            *(*kinds, 1e-6, 0.0),
        )
        values = z.float() if z_bias is None else z.float() + z_bias  # whose rounding is not the statistics'
        exact, eager = cell(values.double(), c.double(), norm), cell(values, c, norm)
        error, allowed = (found[0] - exact).abs().max().item(), 2 * (eager - exact).abs().max().item()
        allowed += (2e-4 if features > 4096 else 1e-5) * max(1.0, exact.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
