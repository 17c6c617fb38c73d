"""DenseFormer: a depth-weighted average after each block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..functional import layer_mix, norm_step
from .base import State, affine_of, check_layers
from .placements import PreNorm


class DenseFormer(PreNorm):
    """Pre-norm, and after block i a weighted sum of blocks' outputs: Pagliardini et al., arXiv 2402.02622.

        x = sum_j a_ij x_j     over j <= i with j = i mod dilation, after every period-th block i

    x_0 is the embedded input and x_j the output of block j before its own sum. The weights start at 1 for j = i and
    0 elsewhere, so that the stack starts as pre-norm.

    Args:
        d_model, num_branches, norm, eps: see :class:`PreNorm`.
        dilation: in blocks.
        period: in blocks.
        branches_per_layer: how many branches make a block. A stack gives its own.

    Parameter: ``weights`` (num_layers // period, num_layers + 1), of which the sources' entries are used.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    mixes_depth = True

    def __init__(
        self,
        d_model: int,
        num_branches: int,
        *,
        dilation: int = 1,
        period: int = 1,
        branches_per_layer: int = 1,
        norm: str = "layer",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, num_branches, norm=norm, eps=eps)
        checks.check_size("dilation", dilation)
        checks.check_size("period", period)
        self.num_layers = check_layers(num_branches, branches_per_layer)
        self.dilation, self.period, self.branches_per_layer = dilation, period, branches_per_layer
        self.weights = nn.Parameter(torch.empty(self.num_layers // period, self.num_layers + 1))
        self.kept = [self._find_kept(block) for block in range(self.num_layers + 1)]
        self._reset_weights()

    @torch.no_grad()
    def _reset_weights(self) -> None:
        values = torch.zeros_like(self.weights)
        for index in range(values.shape[0]):
            values[index, (index + 1) * self.period] = 1
        self.weights.copy_(values)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_weights()

    def no_weight_decay(self) -> set[str]:
        return {"weights"}

    def _sources(self, block: int) -> range:
        """The blocks that are summed after ``block``; none where it has no sum."""
        if block == 0 or block % self.period:
            return range(0)
        return range(block % self.dilation, block + 1, self.dilation)

    def _find_kept(self, block: int) -> list[int]:
        """The blocks up to ``block`` that a later sum reads: those that the state holds after it."""
        later = {j for k in range(block + 1, self.num_layers + 1) for j in self._sources(k)}
        return [j for j in range(block + 1) if j in later]

    def start(self, x: Tensor) -> State:
        return (x, x) if self.kept[0] else (x,)

    def write(self, state: State, y: Tensor, i: int) -> State:
        x, _ = self._advance(state[0], y, i, None)
        return self._close(state, x, i, None)[0]

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        following = self.read_norms[i + 1]  # type: ignore[index]
        block, place = divmod(i + 1, self.branches_per_layer)
        if place or not self._sources(block):
            x, u = self._advance(state[0], y, i, following)
            return self._close(state, x, i, None)[0], u
        x, _ = self._advance(state[0], y, i, None)
        state, normed = self._close(state, x, i, following)
        return state, following(state[0]) if normed is None else normed

    def _close(self, state: State, x: Tensor, i: int, following: nn.Module | None) -> tuple[State, Tensor | None]:
        """The state after branch i, which left x, and ``following`` of its sum where one kernel makes both."""
        block, place = divmod(i + 1, self.branches_per_layer)
        if place:
            return (x, *state[1:]), None
        outputs = dict(zip(self.kept[block - 1], state[1:], strict=True)) | {block: x}
        kept = tuple(outputs[j] for j in self.kept[block])
        sources = self._sources(block)
        if not sources:
            return (x, *kept), None
        weights = self.weights[block // self.period - 1, sources.start : sources.stop : sources.step]
        affine = affine_of(following)
        if following is None or affine is None:
            (x,) = layer_mix([outputs[j] for j in sources], weights[None])
            return (x, *kept), None
        # The last source comes with the norm, as a branch does in pre-norm: at initialisation to the same bits.
        # Where it is the only one, nothing is added to it.
        alone = len(sources) == 1
        (earlier,) = (x,) if alone else layer_mix([outputs[j] for j in sources[:-1]], weights[None, :-1])
        b, a, (weight, bias) = weights[-1], 0.0 if alone else 1.0, affine
        x, u = norm_step(earlier, x, a=a, b=b, weight2=weight, bias2=bias, norm=self.norm, eps=self.eps)
        return (x, *kept), u

    def _elements(self) -> int:
        layers, inner = self.num_layers, 4 * (self.branches_per_layer - 1)
        total = 2 + layers * inner + 2
        for block in range(1, layers + 1):
            number = len(self._sources(block))
            if block == layers:
                total += 3 + (number + 1 if number else 0)
            elif number == 0:
                total += 4
            else:  # the earlier sources' sum, then the last one with the norm
                total += 3 + (number + 4 if number > 1 else 3)
        return total
