"""The depth-wise LSTM cell as a plain PyTorch module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, sharding
from ..activations import activate
from ..plain import is_plain
from .attention import INITS, initialise_linear
from .depth_lstm import depth_lstm_gates

HIDDENS = ("linear", "ffn")
# With 0, as in the paper, deep stacks hardly learn: docs/study.md has dev cross entropies for 0 to 3.
FORGET_BIAS = 3.0


class GateNorm(nn.Module):
    """The affine of the gates' normalisation: ``weight`` and ``bias``, (4, D) or (3, D).

    Rows are gates in the order i, f, o, g. The module holds the parameters, and the gates function applies them. As a
    separate module it lets code that sorts parameters by module (weight decay, initialisation loops) tell these
    two-dimensional parameters from matrices. The cell reads the parameters of a plain GateNorm directly. It calls a
    GateNorm that is hooked, pruned, parametrised or wrapped by an adapter.
    """

    def __init__(
        self, gates: int, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(gates, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(gates, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, forget_bias: float = 0.0) -> None:
        """Set ones and zeros; ``forget_bias`` goes to the forget gate's row of the bias."""
        nn.init.ones_(self.weight)
        fill_rows(self.bias, 1, 2, forget_bias)

    def forward(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (weight, bias), each (4, D) or (3, D), as new tensors.

        New tensors are needed because a hook may free the parameters when this call ends.

        Args:
            x: not used. Wrappers of normalisation layers pass the layer's input on.
        """
        return self.weight.clone(), self.bias.clone()

    def extra_repr(self) -> str:
        return f"gates={self.weight.shape[0]}, features={self.weight.shape[1]}"


@torch.no_grad()
def fill_rows(bias: Tensor, first: int, end: int, value: float) -> None:
    """``value`` in rows ``first`` to ``end - 1`` of ``bias``, zeros elsewhere.

    An index would not work: a row of a sharded parameter is a copy, and a write to it is lost.
    """
    values = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    values[first:end] = value
    bias.copy_(sharding.replicated(values, bias))


class DepthLSTMCell(nn.Module):
    """One step of the depth-wise LSTM for every token, in plain PyTorch.

        z    = W [x ; h'] + b                       gates i, f, o, g in this order
        a_k  = gamma_k (z_k - mean) / sqrt(var + eps) + beta_k
        c    = sigmoid(a_f) c' + sigmoid(a_i) g,    g = dropout(act(a_g))
        h    = sigmoid(a_o) c

    Args:
        input_size: I, the size of x.
        hidden_size: D, the size of the states h and c.
        hidden: "linear": g comes from z. "ffn": W gives i, f, o only, and g is a feed-forward network of [x ; h'],
            ``ffn_out(dropout(act(ffn_norm(ffn_in([x ; h'])))))``, also followed by dropout.
        ffn_size: inner size F of that network; 4D if None.
        norm: "gate": statistics over the D features of each gate; "joint": over all gates at once; "none": a = z.
        activation: "gelu", "gelu_tanh", "relu", "tanh", "silu" or "sigmoid".
        eps: added to the variance.
        dropout: probability with which elements of g (and of the network's inner layer) are dropped in training.
        bias: whether ``gates``, ``ffn_in`` and ``ffn_out`` have a bias. The normalisation always has one.
        forget_bias: initial value of the forget gate's bias: its row of ``norm.bias``, or with ``norm="none"`` of
            ``gates.bias``. The paper has 0, with which deep stacks train poorly (docs/study.md).
        init: "lipschitz" or "glorot", see :func:`initialise_linear`.

    Parameters: ``gates.weight`` (4D, I + D), ``gates.bias`` (4D,), ``norm.weight`` and ``norm.bias`` (4, D). With
    ``hidden="ffn"`` 3 replaces 4, and ``ffn_in`` (I + D -> F), ``ffn_norm`` (F), ``ffn_out`` (F -> D) are added.

    Raises:
        TypeError, ValueError: a size, name or number is invalid, or forget_bias has no bias to go to.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hidden: str = "linear",
        ffn_size: int | None = None,
        norm: str = "gate",
        activation: str = "gelu",
        eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = True,
        forget_bias: float = FORGET_BIAS,
        init: str = "lipschitz",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_placement(device, dtype)
        checks.check_size("input_size", input_size)
        checks.check_size("hidden_size", hidden_size)
        checks.check_flags(bias=bias)
        checks.check_name("hidden", hidden, HIDDENS)
        checks.check_name("norm", norm, checks.NORMS)
        checks.check_name("activation", activation, checks.ACTIVATIONS)
        checks.check_eps("eps", eps)
        checks.check_probability("dropout", dropout)
        checks.check_initial("forget_bias", forget_bias, dtype)
        checks.check_name("init", init, INITS)
        if ffn_size is not None:
            checks.check_size("ffn_size", ffn_size)
        if norm == "none" and not bias:
            # the default, told by its identity, goes to no bias where there is none
            forget_bias = 0.0 if forget_bias is FORGET_BIAS else forget_bias
        if norm == "none" and not bias and forget_bias != 0:
            raise ValueError(
                f'forget_bias must be 0 with norm="none" and bias=False, '
                f"which leave no bias to set; found {forget_bias}"
            )
        self.input_size, self.hidden_size, self.hidden, self.norm_kind = input_size, hidden_size, hidden, norm
        self.ffn_size = (4 * hidden_size if ffn_size is None else ffn_size) if hidden == "ffn" else None
        self.activation, self.eps, self.dropout, self.forget_bias, self.init = (
            activation,
            eps,
            dropout,
            forget_bias,
            init,
        )
        width, rows = input_size + hidden_size, 4 if hidden == "linear" else 3
        self.gates: nn.Module = nn.Linear(width, rows * hidden_size, bias, device, dtype)
        self.norm: nn.Module | None = GateNorm(rows, hidden_size, device, dtype) if norm != "none" else None
        if self.ffn_size is not None:
            self.ffn_in: nn.Module = nn.Linear(width, self.ffn_size, bias, device, dtype)
            self.ffn_norm: nn.Module = nn.LayerNorm(self.ffn_size, eps, device=device, dtype=dtype)
            self.ffn_out: nn.Module = nn.Linear(self.ffn_size, hidden_size, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices anew; set biases to 0, normalisations to 1 and 0, then the forget bias."""
        initialise_linear(self.gates, self.init, 4 if self.hidden == "linear" else 3)
        if self.hidden == "ffn":
            initialise_linear(self.ffn_in, self.init)
            initialise_linear(self.ffn_out, self.init)
            if isinstance(self.ffn_norm, nn.LayerNorm):
                self.ffn_norm.reset_parameters()
        if isinstance(self.norm, GateNorm):
            self.norm.reset_parameters(self.forget_bias)
        elif self.norm is None and isinstance(self.gates, nn.Linear) and self.gates.bias is not None:
            fill_rows(self.gates.bias, self.hidden_size, 2 * self.hidden_size, self.forget_bias)

    def extra_repr(self) -> str:
        network = f", ffn_size={self.ffn_size}" if self.hidden == "ffn" else ""
        return (
            f"{self.input_size}, {self.hidden_size}, hidden={self.hidden!r}{network}, norm={self.norm_kind!r}, "
            f"activation={self.activation!r}, eps={self.eps}, dropout={self.dropout}"
        )

    def _unpack(
        self, input: Tensor | tuple[Tensor, ...], state: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the K-slices of x, h' and c', checked."""
        inputs = input if isinstance(input, tuple) else (input,)
        if not inputs:
            raise ValueError("input must hold at least one tensor; found an empty tuple")
        for part in inputs:
            checks.check_float_tensor("input", part)
            if part.dim() == 0 or part.shape[:-1] != inputs[0].shape[:-1]:
                raise ValueError(
                    f"input must have shapes (..., I) with one leading shape; "
                    f"found {[tuple(part.shape) for part in inputs]}"
                )
        leading, size = inputs[0].shape[:-1], sum(part.shape[-1] for part in inputs)
        if size != self.input_size:
            raise ValueError(f"input must have {self.input_size} features; found {size}")
        if state is None:
            zeros = inputs[0].new_zeros((*leading, self.hidden_size))
            return inputs, zeros, zeros
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"state must be a pair (h, c) of tensors; found {type(state).__name__}")
        h, c = state
        for argument, tensor in (("h", h), ("c", c)):
            checks.check_float_tensor(argument, tensor)
            checks.check_shape(argument, tensor, (*leading, self.hidden_size))
        return inputs, h, c

    def _ffn_tail(self, inner: Tensor) -> Tensor:
        """Run the feed-forward network from its inner pre-activation (..., F) on."""
        inner = activate(self.ffn_norm(inner), self.activation)
        return self.ffn_out(F.dropout(inner, self.dropout, self.training))

    def forward(
        self, input: Tensor | tuple[Tensor, ...], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step over depth.

        Args:
            input: x, (..., I), or a tuple of tensors that stand for their concatenation.
            state: (h', c'), both (..., D), of the layer below; zeros if None.

        Returns:
            (h, c), both (..., D); h in the type of the gates' product, c in that of c'.

        Raises:
            TypeError, ValueError: the message names the argument, the wanted and the found value.
        """
        inputs, h, c = self._unpack(input, state)
        x = torch.cat((*inputs, h), dim=-1)
        hidden = self._ffn_tail(self.ffn_in(x)) if self.hidden == "ffn" else None
        return depth_lstm_gates(self.gates(x), c, **self._options(c, hidden))

    def _affine(self, c: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the weight and bias of the normalisation; a ``norm`` that is not plain is called for them."""
        norm = self.norm
        if norm is None:
            return None, None
        if is_plain(norm, GateNorm):
            return norm.weight, norm.bias  # type: ignore[return-value]
        # detached: a backward hook waits for the gradient of the input, and this input has none
        affine = norm(c.detach())
        if not isinstance(affine, tuple) or len(affine) != 2:
            raise TypeError(
                f"norm must be a GateNorm, or wrap one, and return (weight, bias); found {type(norm).__name__}"
            )
        return affine

    def _options(self, c: Tensor, hidden: Tensor | None) -> dict:
        weight, bias = self._affine(c)
        return {
            "weight": weight,
            "bias": bias,
            "hidden": hidden,
            "norm": self.norm_kind,
            "activation": self.activation,
            "eps": self.eps,
            "dropout_p": self.dropout,
            "training": self.training,
        }
