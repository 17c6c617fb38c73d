"""Dynamic linear combination of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..functional import layer_mix, norm_step
from .base import Connection, State, affine_of, check_layers, make_norms


class DLCL(Connection):
    """Each layer's input is a weighted sum of all earlier layers' outputs: Wang et al., ACL 2019.

    y_0 is the embedded input and y_l the output of layer l, inside which branches are connected as in pre-norm or
    post-norm. The input of layer l + 1, and after the last layer the output, is

        sum_{k <= l} W_lk N_k(y_k)     pre-norm; y_0 is not normalised, and the output is normalised once more
        N_l(sum_{k <= l} W_lk y_k)     post-norm; W_00 y_0 is not normalised

    Args:
        d_model, num_branches: see :class:`Connection`.
        normalize_before: pre-norm, or else post-norm.
        branches_per_layer: how many branches make a layer. A stack gives its own.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: of every norm.

    Parameters: ``weights`` (L + 1, L + 1), lower triangular, row l at 1 / (l + 1); ``history_norms``, one for each
        layer; ``branch_norms``, one for each branch; in pre-norm ``final_norm``.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    mixes_depth = True

    def __init__(
        self,
        d_model: int,
        num_branches: int,
        *,
        normalize_before: bool = True,
        branches_per_layer: int = 1,
        norm: str = "layer",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, num_branches)
        checks.check_flags(normalize_before=normalize_before)
        self.num_layers = check_layers(num_branches, branches_per_layer)
        self.normalize_before, self.branches_per_layer, self.norm, self.eps = (
            normalize_before,
            branches_per_layer,
            norm,
            eps,
        )
        self.weights = nn.Parameter(torch.empty(self.num_layers + 1, self.num_layers + 1))
        self.history_norms = make_norms(self.num_layers, d_model, norm, eps)
        self.branch_norms = make_norms(num_branches, d_model, norm, eps)
        self.final_norm = make_norms(1, d_model, norm, eps)[0] if normalize_before else None
        self._reset_weights()

    @torch.no_grad()
    def _reset_weights(self) -> None:
        rows = torch.ones_like(self.weights).tril()
        self.weights.copy_(rows / rows.sum(1, keepdim=True))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_weights()

    def no_weight_decay(self) -> set[str]:
        return {"weights"}

    def _mix(self, history: State) -> Tensor:
        row = len(history) - 1
        (mixed,) = layer_mix(history, self.weights[row : row + 1, : row + 1])
        return mixed

    def start(self, x: Tensor) -> State:
        return self._mix((x,)), x

    def read(self, state: State, i: int) -> Tensor:
        return self.branch_norms[i](state[0]) if self.normalize_before else state[0]

    def write(self, state: State, y: Tensor, i: int) -> State:
        if (i + 1) % self.branches_per_layer:
            return self._advance(state, y, i, None)[0]
        return self._end_layer(state, y, i)

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        if (i + 1) % self.branches_per_layer:
            return self._advance(state, y, i, self.branch_norms[i + 1] if self.normalize_before else None)
        state = self._end_layer(state, y, i)
        return state, self.read(state, i + 1)

    def _advance(self, state: State, y: Tensor, i: int, following: nn.Module | None) -> tuple[State, Tensor]:
        """A residual connection inside a layer, and the norm that ``following`` is."""
        after = None if self.normalize_before else self.branch_norms[i]
        first, second = affine_of(after), affine_of(following)
        if first is not None and second is not None:
            (weight1, bias1), (weight2, bias2) = first, second
            x, u = norm_step(
                state[0], y, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, norm=self.norm, eps=self.eps
            )
        else:
            x, _ = norm_step(state[0], y)
            x = x if after is None else after(x)
            u = x if following is None else following(x)
        return (x, *state[1:]), u

    def _end_layer(self, state: State, y: Tensor, i: int) -> State:
        norm = self.history_norms[i // self.branches_per_layer]
        if self.normalize_before:
            history = (*state[1:], self._advance(state, y, i, norm)[1])
            return self._mix(history), *history
        history = (*state[1:], self._advance(state, y, i, None)[0][0])
        return norm(self._mix(history)), *history

    def finish(self, state: State) -> Tensor:
        return state[0] if self.final_norm is None else self.final_norm(state[0])

    def _elements(self) -> int:
        layers, per_layer = self.num_layers, self.branches_per_layer
        mixed = sum(layer + 2 for layer in range(layers + 1))
        if self.normalize_before:
            return mixed + layers * (2 + 4 * (per_layer - 1) + 3) + 2
        return mixed + layers * (3 * per_layer + 2)
