"""SiameseNorm: a normalised stream and a plain one."""

from __future__ import annotations

import math

from torch import Tensor

from ..functional import siamese_step
from .base import Connection, State, affines_of, check_layers, make_norms


class Siamese(Connection):
    """Two streams, X normalised after each branch and Y never: SiameseNorm, arXiv 2602.08064.

        o = F(N(X + N_y Y)),  X' = N_x(X + o / c),  Y' = Y + o,   c = sqrt(2 (l + 1)) in layer l, counted from 0

    Both start as the input; the output is X + N_y Y.

    Args:
        d_model, num_branches: see :class:`Connection`.
        branches_per_layer: how many branches share an l. A stack gives its own.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: of every norm.

    Parameters: ``read_norms`` (N), ``x_norms`` (N_x), one for each branch, and ``y_norms`` (N_y), one more.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    def __init__(
        self, d_model: int, num_branches: int, *, branches_per_layer: int = 1, norm: str = "layer", eps: float = 1e-6
    ) -> None:
        super().__init__(d_model, num_branches)
        check_layers(num_branches, branches_per_layer)
        self.branches_per_layer, self.norm, self.eps = branches_per_layer, norm, eps
        self.read_norms = make_norms(num_branches, d_model, norm, eps)
        self.x_norms = make_norms(num_branches, d_model, norm, eps)
        self.y_norms = make_norms(num_branches + 1, d_model, norm, eps)

    def _c(self, i: int) -> float:
        return math.sqrt(2 * (i // self.branches_per_layer + 1))

    def start(self, x: Tensor) -> State:
        return x, x

    def read(self, state: State, i: int) -> Tensor:
        return self.read_norms[i](state[0] + self.y_norms[i](state[1]))

    def write(self, state: State, y: Tensor, i: int) -> State:
        return self.x_norms[i](state[0] + y / self._c(i)), state[1] + y

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        norms = {"_x": self.x_norms[i], "_y": self.y_norms[i + 1], "": self.read_norms[i + 1]}
        affines = affines_of(norms)  # type: ignore[arg-type]
        if affines is None:
            return super().step(state, y, i)
        x, stream = state
        new_x, new_y, u = siamese_step(x, stream, y, **affines, c=self._c(i), norm=self.norm, eps=self.eps)
        return (new_x, new_y), u

    def finish(self, state: State) -> Tensor:
        return state[0] + self.y_norms[self.num_branches](state[1])

    def _elements(self) -> int:
        # the first read has one tensor to read, since both streams are the input
        return 2 + 6 * (self.num_branches - 1) + 5 + 3
