"""What layers and stacks share about layout: (batch, length, D) inside, whatever ``batch_first`` says outside."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .attention import attention_mask


class Layout:
    """Tensors brought into (batch, length, D) and back, and masks for it."""

    d_model: int
    nhead: int
    batch_first: bool

    def _check_beside(self, argument: str, outside: Tensor) -> None:
        """Raise TypeError or ValueError where an input's dtype or device is not that of the weights it meets."""

    def _enter(self, argument: str, outside: Tensor) -> Tensor:
        """(batch, length, D) from whatever layout the caller uses."""
        checks.check_float_tensor(argument, outside)
        if outside.dim() not in (2, 3) or outside.shape[-1] != self.d_model:
            shape = (
                f"({'batch, length' if self.batch_first else 'length, batch'}, "
                f"{self.d_model}) or (length, {self.d_model})"
            )
            raise ValueError(f"{argument} must have shape {shape}; found {tuple(outside.shape)}")
        self._check_beside(argument, outside)
        if outside.dim() == 2:
            return outside.unsqueeze(0)
        if self.batch_first:
            return outside
        inside = outside.transpose(0, 1)
        # _leave returns such a view, so in a stack only the first layer copies; without this every consumer of it would
        rows_apart = inside.stride(1)
        return (
            inside
            if inside.stride(2) == 1 and inside.stride(0) == inside.shape[1] * rows_apart
            else inside.contiguous()
        )

    def _leave(self, inside: Tensor, like: Tensor) -> Tensor:
        if like.dim() == 2:
            return inside.squeeze(0)
        return inside if self.batch_first else inside.transpose(0, 1)

    def _masks(
        self,
        h: Tensor,
        keys: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        causal: bool,
        arguments: tuple[str, str],
        unbatched: bool,
    ) -> tuple[Tensor | None, bool]:
        if unbatched and padding is not None and isinstance(padding, Tensor) and padding.dim() == 1:
            padding = padding.unsqueeze(0)
        sizes = (h.shape[0], self.nhead, h.shape[1], keys.shape[1])
        return attention_mask(mask, padding, causal, sizes=sizes, device=h.device, arguments=arguments)
