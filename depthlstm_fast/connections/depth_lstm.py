"""The depth-wise LSTM as a depth connection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..layers import DepthLSTMCell
from ..reference.cell import FORGET_BIAS
from ..reference.stacks import INIT_CELLS
from .base import Connection, State, make_norms


class DepthLSTM(Connection):
    """(h, c) = cell(F(h), (h, c)), and a norm on the output: Xu et al., arXiv 2007.06257.

    Args:
        d_model, num_branches: see :class:`Connection`.
        hidden, ffn_size, norm, activation, eps, dropout, bias, forget_bias: see
            :class:`depthlstm_fast.DepthLSTMCell`.
        share_cell: all branches share the first one's cell.
        init_cell: "zeros", or "learned": a parameter ``initial_cell`` (C,) that starts at zero.
        output_norm: "layer" (LayerNorm) or "rms" (RMSNorm), on the output.

    Parameters: ``cells``, a :class:`depthlstm_fast.DepthLSTMCell` for each branch, and ``final_norm``.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    absorbs_feed_forward = True

    def __init__(
        self,
        d_model: int,
        num_branches: int,
        *,
        hidden: str = "linear",
        ffn_size: int | None = None,
        norm: str = "gate",
        activation: str = "gelu",
        eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = True,
        forget_bias: float = FORGET_BIAS,
        share_cell: bool = False,
        init_cell: str = "zeros",
        output_norm: str = "layer",
    ) -> None:
        super().__init__(d_model, num_branches)
        checks.check_flags(share_cell=share_cell)
        checks.check_name("init_cell", init_cell, INIT_CELLS)
        options: dict[str, Any] = {
            "hidden": hidden,
            "ffn_size": ffn_size,
            "norm": norm,
            "activation": activation,
            "eps": eps,
            "dropout": dropout,
            "bias": bias,
            "forget_bias": forget_bias,
        }
        self.share_cell, self.init_cell = share_cell, init_cell
        cells = [DepthLSTMCell(d_model, d_model, **options) for _ in range(1 if share_cell else num_branches)]
        cells = cells * num_branches if share_cell else cells
        for cell in cells[:-1]:
            cell.left = d_model  # a kernel may leave room beside h for the next branch's output
        self.cells = nn.ModuleList(cells)
        checks.check_name("output_norm", output_norm, checks.NORMALISATIONS)
        self.final_norm = make_norms(1, d_model, output_norm, eps)[0]
        self.initial_cell = nn.Parameter(torch.zeros(d_model)) if init_cell == "learned" else None

    def start(self, x: Tensor) -> State:
        return x, torch.zeros_like(x) if self.initial_cell is None else self.initial_cell.expand_as(x)

    def read(self, state: State, i: int) -> Tensor:
        return state[0]

    def write(self, state: State, y: Tensor, i: int) -> State:
        return self.cells[i](y, state)

    def finish(self, state: State) -> Tensor:
        return self.final_norm(state[0])

    def no_weight_decay(self) -> set[str]:
        return set() if self.initial_cell is None else {"initial_cell"}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.initial_cell is not None:
            nn.init.zeros_(self.initial_cell)

    def _elements(self) -> int:
        # z (with hidden="ffn" three gates and g) and c' in, h and c out
        return 7 * self.num_branches + 2
