"""Attention residuals: each branch attends to the outputs of all earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..functional import layer_attend
from .base import Connection, State, affine_of, make_norms


class AttentionResiduals(Connection):
    """A branch's input is N of a softmax-weighted sum of the embedded input and earlier outputs: arXiv 2603.15031.

        u_i = sum_j softmax_j(w_i . RMSNorm(v_j)) v_j

    In the full form v_j are the embedded input and the outputs of all branches before i. In the block form they are the
    embedded input, the sums of the outputs of each finished block, and the sum of the unfinished one so far. There is
    no 1/sqrt(C). The queries w start at zero, where u is the mean. The first branch has one source, and no query. The
    output is N of one more such sum.

    Args:
        d_model, num_branches: see :class:`Connection`.
        block_size: in branches; None for the full form. The last block may be smaller.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm): the kind of N. The keys' norm is RMSNorm.
        eps: of every norm.

    Parameters: ``queries`` and ``key_weights`` (num_branches, C), for branches 1, 2, ... and the output;
        ``read_norms``, one for each branch, and ``final_norm``.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    mixes_depth = True

    def __init__(
        self,
        d_model: int,
        num_branches: int,
        *,
        block_size: int | None = None,
        norm: str = "layer",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, num_branches)
        if block_size is not None:
            checks.check_size("block_size", block_size)
        self.block_size, self.norm, self.eps = block_size, norm, eps
        self.queries = nn.Parameter(torch.zeros(num_branches, d_model))
        self.key_weights = nn.Parameter(torch.ones(num_branches, d_model))
        self.read_norms = make_norms(num_branches, d_model, norm, eps)
        self.final_norm = make_norms(1, d_model, norm, eps)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.queries)
        nn.init.ones_(self.key_weights)

    def no_weight_decay(self) -> set[str]:
        return {"queries", "key_weights"}

    def _attend(self, state: State, row: int, norm: nn.Module) -> Tensor:
        affine = affine_of(norm)
        weight, bias = (None, None) if affine is None else affine
        query, key_weight = self.queries[row], self.key_weights[row]
        u = layer_attend(state, query, key_weight, weight, bias, norm=self.norm, eps=self.eps)
        return norm(u) if affine is None else u

    def read(self, state: State, i: int) -> Tensor:
        return self.read_norms[0](state[0]) if i == 0 else self._attend(state, i - 1, self.read_norms[i])

    def write(self, state: State, y: Tensor, i: int) -> State:
        if self.block_size is None or i % self.block_size == 0:
            return (*state, y)
        return (*state[:-1], state[-1] + y)

    def finish(self, state: State) -> Tensor:
        return self._attend(state, self.num_branches - 1, self.final_norm)

    def _elements(self) -> int:
        size = 1 if self.block_size is None else self.block_size
        # after i branches there are 1 + ceil(i / size) sources
        read = sum(2 + -(-i // size) for i in range(1, self.num_branches + 1))
        added = sum(3 for i in range(self.num_branches) if i % size)
        return 2 + read + added
