"""The depth-wise GRU, and as a depth connection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..functional import depth_gru_gates
from ..plain import is_plain
from ..reference.attention import draw_uniform, initialise_linear
from ..reference.cell import GateNorm, fill_rows
from .base import Connection, State, make_norms


class DepthGRUCell(nn.Module):
    """One step of a GRU over depth, h' = (1 - u) * n + u * h; see :func:`depthlstm_fast.depth_gru_gates`.

    Args:
        input_size, hidden_size: sizes of y and h.
        reset_before: the reset gate acts before the state's product, as in GTrXL, not after it as in nn.GRUCell.
        gate_norm: a LayerNorm on each gate.
        update_bias: initial bias of the update gate; above 0 it keeps more of h. GTrXL takes 2.
        bias: whether the products have biases.
        eps: of the LayerNorms.

    Parameters: ``input_proj`` (I -> 3C: reset, update, new), ``state_proj`` (C -> 3C, or 2C with ``reset_before``),
        which nn.GRUCell calls ``ih`` and ``hh``; ``reset_weight`` (C, C) with ``reset_before``; ``norm`` (4 or 3, C)
        with ``gate_norm``.

    Raises:
        TypeError, ValueError: a size or number is not what is wanted, or update_bias has no bias to go to.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        reset_before: bool = False,
        gate_norm: bool = False,
        update_bias: float = 0.0,
        bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        checks.check_size("input_size", input_size)
        checks.check_size("hidden_size", hidden_size)
        checks.check_flags(reset_before=reset_before, gate_norm=gate_norm, bias=bias)
        checks.check_initial("update_bias", update_bias)
        checks.check_eps("eps", eps)
        if not bias and not gate_norm and update_bias != 0:
            raise ValueError(
                f"update_bias must be 0 with bias=False and gate_norm=False, which leave no bias to set; "
                f"found {update_bias}"
            )
        self.input_size, self.hidden_size = input_size, hidden_size
        self.update_bias, self.eps, self.init = update_bias, eps, "lipschitz"
        self.input_proj: nn.Module = nn.Linear(input_size, 3 * hidden_size, bias)
        self.state_proj: nn.Module = nn.Linear(hidden_size, (2 if reset_before else 3) * hidden_size, bias)
        self.reset_weight = nn.Parameter(torch.empty(hidden_size, hidden_size)) if reset_before else None
        self.norm = GateNorm(3 if reset_before else 4, hidden_size) if gate_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices anew; biases 0, norms 1 and 0, then the update bias."""
        initialise_linear(self.input_proj, self.init, 3)
        initialise_linear(self.state_proj, self.init, 3 if self.reset_weight is None else 2)
        if self.reset_weight is not None:
            size = self.hidden_size
            draw_uniform(self.reset_weight, (1 / size if self.init == "lipschitz" else 3 / size) ** 0.5)
        if self.norm is not None:
            self.norm.reset_parameters(self.update_bias)
        elif isinstance(self.input_proj, nn.Linear) and self.input_proj.bias is not None:
            fill_rows(self.input_proj.bias, self.hidden_size, 2 * self.hidden_size, self.update_bias)

    def forward(self, y: Tensor, h: Tensor) -> Tensor:
        """h' (..., C) from y (..., I) and h (..., C).

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted.
        """
        size = self.hidden_size
        checks.check_float_tensor("y", y)
        checks.check_float_tensor("h", h)
        if y.dim() == 0 or y.shape[-1] != self.input_size:
            raise ValueError(f"y must have shape (..., {self.input_size}); found {tuple(y.shape)}")
        checks.check_shape("h", h, (*y.shape[:-1], size))
        checks.check_beside("y", y, self.input_proj)
        checks.check_beside("h", h, self.state_proj)
        from_y, from_h = self.input_proj(y), self.state_proj(h)
        gates = from_y[..., : 2 * size] + from_h[..., : 2 * size]
        z = torch.cat((gates, from_y[..., 2 * size :], from_h[..., 2 * size :]), -1)
        affine = (None, None) if self.norm is None else _affine(self.norm)
        return depth_gru_gates(z, h, *affine, reset_weight=self.reset_weight, eps=self.eps)


def _affine(norm: GateNorm) -> tuple[Tensor, Tensor]:
    return (norm.weight, norm.bias) if is_plain(norm, GateNorm) else norm()


class DepthGRU(Connection):
    """h' = GRU(F(h), h), and a norm on the output: Wei et al., ACL 2020, and GTrXL, arXiv 1910.06764.

    Args:
        d_model, num_branches: see :class:`Connection`.
        reset_before, gate_norm, update_bias, bias, eps: see :class:`DepthGRUCell`.
        output_norm: "layer" (LayerNorm) or "rms" (RMSNorm), on the output.

    Parameters: ``cells``, one for each branch, and ``final_norm``.

    Raises:
        TypeError, ValueError: a size or number is not what is wanted.
    """

    absorbs_feed_forward = True

    def __init__(
        self,
        d_model: int,
        num_branches: int,
        *,
        reset_before: bool = False,
        gate_norm: bool = False,
        update_bias: float = 0.0,
        bias: bool = True,
        eps: float = 1e-6,
        output_norm: str = "layer",
    ) -> None:
        super().__init__(d_model, num_branches)
        self.cells = nn.ModuleList(
            [
                DepthGRUCell(
                    d_model,
                    d_model,
                    reset_before=reset_before,
                    gate_norm=gate_norm,
                    update_bias=update_bias,
                    bias=bias,
                    eps=eps,
                )
                for _ in range(num_branches)
            ]
        )
        checks.check_name("output_norm", output_norm, checks.NORMALISATIONS)
        self.final_norm = make_norms(1, d_model, output_norm, eps)[0]

    def read(self, state: State, i: int) -> Tensor:
        return state[0]

    def write(self, state: State, y: Tensor, i: int) -> State:
        return (self.cells[i](y, state[0]),)

    def finish(self, state: State) -> Tensor:
        return self.final_norm(state[0])

    def _elements(self) -> int:
        # z and h in, h' out of the gates
        return 6 * self.num_branches + 2
