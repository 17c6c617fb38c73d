"""A decoder's other ways to attend: merged with an average of its own positions, or to two memories at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..plain import is_plain_linear
from .attention import CrossAttention, initialise_linear
from .caches import DecoderCache, select_rows

FUSIONS = ("gate", "scalar")


@dataclass
class MergedCache(DecoderCache):
    """What a decoder layer with merged attention keeps: the running sum of its positions' values, (rows, 1, D)."""

    total: Tensor | None = None
    attention: ClassVar[str] = "merged"

    @property
    def rows(self) -> int | None:
        return None if self.total is None else self.total.shape[0]

    def reorder(self, rows: Tensor) -> None:
        if self.total is not None:
            (self.total,) = select_rows((self.total,), rows)


class MergedAttention(CrossAttention):
    """A decoder's self- and cross-attention in one: out_proj(Attn(x W_q, m W_k, m W_v) + A x W_v).

    A is the causal mean, the average over the positions so far, and W_v is that of the memory. Arguments and parameters
    are those of :class:`CrossAttention`. Dropout does not act on the average.
    Source: MAtt, Zhang et al., EMNLP 2019, arXiv 1908.11365, section 4.
    """

    def _values(self, x: Tensor) -> Tensor:
        """x W_v, (batch, L, D)."""
        linear = self.kv_proj
        if not is_plain_linear(linear):
            return linear(x)[..., self.d_model :]
        bias: Any = linear.bias
        weight: Any = linear.weight
        return F.linear(x, weight[self.d_model :], None if bias is None else bias[self.d_model :])

    def context(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """All of :meth:`forward` but the output projection; ``keep`` (batch, L) bool: the positions to average."""
        attended = super().context(x, memory, mask, is_causal, cache)
        values = self._values(x)
        wide = values.double() if values.dtype == torch.float64 else values.float()
        if cache is not None:
            if not isinstance(cache, MergedCache):
                raise TypeError(f"cache must be a MergedCache, as new_caches makes it; found {type(cache).__name__}")
            cache.total = wide if cache.total is None else cache.total + wide
            cache.length += 1
            return attended + (cache.total / cache.length).to(attended.dtype)
        if keep is None:
            count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=wide.dtype)[:, None]
        else:
            wide = wide * keep[..., None]
            count = keep.cumsum(1).clamp(min=1)[..., None].to(wide.dtype)
        return attended + (wide.cumsum(1) / count).to(attended.dtype)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`CrossAttention.forward`; ``keep`` (batch, L) bool: the positions to average, all if None."""
        return self.out_proj(self.context(x, memory, mask, is_causal, cache, keep))


@dataclass
class MultiscaleCache(DecoderCache):
    """What a decoder layer that attends to two memories keeps: also the second one's cache."""

    context: DecoderCache | None = None
    attention: ClassVar[str] = "multiscale"


class MultiscaleAttention(CrossAttention):
    """Cross-attention to the encoder's output and to a context over all its layers: g * R_C + (1 - g) * R_B.

    R_B attends to memory and R_C, by ``context_attn``, to the context. How g is made is this package's reading of Wei
    et al., ACL 2020, section 3.2: ``fusion="gate"`` is g = sigmoid(W [R_B ; R_C] + b) for each feature, and
    ``"scalar"`` the sigmoid of one learned number, which starts at 0.

    The other arguments and parameters are those of :class:`CrossAttention`.

    Raises:
        TypeError, ValueError: as :class:`CrossAttention`.
    """

    def __init__(self, d_model: int, nhead: int, *, fusion: str = "gate", **options: Any) -> None:
        checks.check_name("fusion", fusion, FUSIONS)
        super().__init__(d_model, nhead, **options)
        self.fusion = fusion
        self.context_attn = CrossAttention(d_model, nhead, **options)
        device, dtype = options.get("device"), options.get("dtype")
        if fusion == "gate":
            self.gate: nn.Module | nn.Parameter = nn.Linear(2 * d_model, d_model, device=device, dtype=dtype)
        else:
            self.gate = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        gate = getattr(self, "gate", None)  # not yet there when CrossAttention draws its own
        if isinstance(gate, nn.Module):
            initialise_linear(gate, self.init)
        elif gate is not None:
            nn.init.zeros_(gate)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`CrossAttention.forward`; ``context`` (batch, S, D) is the second memory, under the same mask."""
        top = super().forward(x, memory, mask, is_causal, cache)
        second = cache.context if isinstance(cache, MultiscaleCache) else None
        whole: Any = second.memory if second is not None else context
        other = self.context_attn(x, whole, mask, is_causal, second)
        if isinstance(self.gate, nn.Module):
            share = torch.sigmoid(self.gate(torch.cat((top, other), -1)))
        else:
            share = torch.sigmoid(self.gate)
        return share * other + (1 - share) * top
