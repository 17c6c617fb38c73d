"""What a decoder sees of an encoder besides its output: mixtures of all its layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .connections import DepthGRUCell
from .functional import layer_mix

MEMORIES = ("top", "transparent", "multiscale")


class TransparentMemory(nn.Module):
    """Decoder layer j attends to z_j = sum_k s_kj h_k, s_j a softmax over k = 0 .. N: Bapna et al., EMNLP 2018.

    h_0 is the embedded input and h_k the output of encoder layer k.

    Parameter: ``weights`` (M, N + 1), whose softmax over the last dimension is s; zeros at the start, the mean.
    """

    def __init__(self, num_encoder_layers: int, num_decoder_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_decoder_layers, num_encoder_layers + 1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weights)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay."""
        return {"weights"}

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The M memories, from the N + 1 outputs; each output is an operand once."""
        return layer_mix(outputs, self.weights.softmax(-1))


class MultiscaleMemory(nn.Module):
    """Decoder layer n attends to encoder layer n, and the top one also to a context over all: Wei et al., ACL 2020.

    The context is C_N of a depth-wise GRU, C_n = GRU(h_n, C_{n-1}), with C_0 the embedded input.

    Parameters: ``cells``, a :class:`DepthGRUCell` for each layer.
    """

    def __init__(self, d_model: int, num_layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([DepthGRUCell(d_model, d_model) for _ in range(num_layers)])

    def reset_parameters(self) -> None:
        for cell in self.cells:
            cell.reset_parameters()  # type: ignore[operator]

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(h_1, ..., h_N, C_N) from the N + 1 outputs."""
        context, *layers = outputs
        for cell, output in zip(self.cells, layers, strict=True):
            context = cell(output, context)
        return *layers, context
