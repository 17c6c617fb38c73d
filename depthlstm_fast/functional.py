"""The functions of the public API: arguments checked, a backend chosen, the call made."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, sharding
from .backends.choice import choose
from .modes import autocast_dtype
from .ops import depth_lstm_autograd
from .ops.depth_lstm import ACTIVATION_CODES, NAME, NORM_CODES, Options
from .reference import depth_lstm as reference


def depth_lstm_gates(
    z: Tensor,
    c: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    norm: str = "gate",
    activation: str = "gelu",
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What follows the GEMM in one depth-wise LSTM step: LayerNorm, gates and cell update, fused.

    With z in the order i, f, o, g and a_k = weight_k * (z_k - mean) / sqrt(var + eps) + bias_k:
    g = dropout(activation(a_g)), c_out = sigmoid(a_f) * c + sigmoid(a_i) * g, h = sigmoid(a_o) * c_out.
    Source: Xu et al., Rewiring the Transformer with Depth-Wise LSTMs, arXiv 2007.06257.

    Args:
        z: (..., 4D), or (..., 3D) in the order i, f, o with ``hidden``; float32, float64, bfloat16 or float16.
        c: (..., D), the cell of the layer below; dtype of z, or float32 beside a 16-bit z (it is then kept in float32).
        weight, bias: (4, D), or (3, D) with ``hidden``; dtype of z, or float32 beside a 16-bit z; None for no affine.
        hidden: (..., D), dtype of z: g before dropout, given instead of being computed from z.
        norm: "gate" (statistics of each gate's D features), "joint" (of all of them), "none" (no LayerNorm, no affine).
        activation: "gelu" (erf), "gelu_tanh", "relu", "tanh", "silu" or "sigmoid"; not used with ``hidden``.
        eps: added to the biased variance.
        dropout_p: probability in [0, 1) with which an element of g is zeroed when ``training``.
        seed: int64 of shape (1,), the dropout mask's key; drawn from torch's generator where None.
        backend: "auto", "reference", "cpp", "cuda" or "triton"; None for the default (:func:`set_backend`).

    Returns:
        h (..., D) in the dtype of z, and c_out (..., D) in the dtype of c.

    Raises:
        TypeError: an argument is no floating-point tensor, or of a dtype that does not go with z.
        ValueError: a shape, device, name or number is not what is wanted, or the backend cannot run the call.
        RuntimeError: double backward through a fused backend.
    """
    checks.check_options(norm, activation, eps, dropout_p)
    checks.check_gates(z, c, weight, bias, hidden, norm, seed)
    drops = training and dropout_p > 0
    chosen = choose(backend, z, NAME, c.shape[-1])
    if chosen == "reference":
        return reference.depth_lstm_gates(
            z,
            c,
            weight,
            bias,
            hidden=hidden,
            norm=norm,
            activation=activation,
            eps=eps,
            dropout_p=dropout_p,
            training=training,
            seed=seed,
        )
    key = _key(seed, z) if drops else None
    options = Options(NORM_CODES[norm], ACTIVATION_CODES[activation], eps, dropout_p if drops else 0.0)
    return depth_lstm_autograd.gates(z, None, hidden, c, weight, bias, key, options, chosen)


def depth_lstm_cell(
    x: Tensor | tuple[Tensor, ...],
    h: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    norm: str = "gate",
    activation: str = "gelu",
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
    left: int = 0,
) -> tuple[Tensor, Tensor]:
    """One step of the depth-wise LSTM: z = w [x ; h] + b, then :func:`depth_lstm_gates`, as one autograd node.

    [x ; h] is not built (but for the few rows of a decoding step without gradients, where that is faster; on CUDA two
    products are made then, and the gates add them up), and between the product and the outputs nothing is kept but z.

    Args:
        x: (..., I), or a tuple of tensors (..., I_1), (..., I_2), ... that stand for their concatenation.
        h, c: (..., D), output and cell of the layer below.
        w: (4D, I + D), or (3D, I + D) with ``hidden``; rows in the order i, f, o, g, columns x first.
        b: (4D), (3D) with ``hidden``, or None.
        left: a hint: the width of the next cell's input. Where the backend can (Triton and CUDA, in eager), h becomes
            the right part of a buffer (..., left + D) whose left part is free, so that x can be written beside it and
            the next product reads [x ; h] in place. h is then not contiguous.

    x, h, w and hidden share one dtype (under autocast they are cast to its dtype); b, c, weight and bias may be float32
    beside a 16-bit one. The other arguments, returns and errors are those of :func:`depth_lstm_gates`.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    checks.check_options(norm, activation, eps, dropout_p)
    checks.check_size("left", left, least=0)
    checks.check_float_tensor("h", h)
    dtype = autocast_dtype(h.device.type)
    if dtype is not None:
        inputs = tuple(_autocast(part, dtype) for part in inputs)
        h, w = _autocast(h, dtype), _autocast(w, dtype)
        hidden = None if hidden is None else _autocast(hidden, dtype)
    checks.check_cell(inputs, h, c, w, b, weight, bias, hidden, norm, seed)
    drops = training and dropout_p > 0
    chosen = choose(backend, h, NAME, c.shape[-1])
    if chosen == "reference":
        return reference.depth_lstm_cell(
            inputs, h, c, w, b, weight, bias,
            hidden=hidden, norm=norm, activation=activation, eps=eps, dropout_p=dropout_p, training=training, seed=seed,
        )  # fmt: skip
    key = _key(seed, h) if drops else None
    options = Options(NORM_CODES[norm], ACTIVATION_CODES[activation], eps, dropout_p if drops else 0.0)
    return depth_lstm_autograd.cell([*inputs, h], w, b, hidden, c, weight, bias, key, options, chosen, left)


def _key(seed: Tensor | None, like: Tensor) -> Tensor:
    """The dropout mask's key for a call on ``like``: one for all ranks beside a DTensor."""
    return sharding.replicated(reference.draw_seed(like.device) if seed is None else seed, like, source_rank=0)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    checks.check_float_tensor("x, h, w and hidden", tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
