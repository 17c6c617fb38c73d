"""The functions of the public API.

Each function checks its arguments, chooses a backend and makes the call.
"""

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
    """Run everything after the GEMM of one depth-wise LSTM step: LayerNorm, gates and cell update, fused.

    With z in the order i, f, o, g and a_k = weight_k * (z_k - mean) / sqrt(var + eps) + bias_k:
    g = dropout(activation(a_g)), c_out = sigmoid(a_f) * c + sigmoid(a_i) * g, h = sigmoid(a_o) * c_out.
    Source: Xu et al., Rewiring the Transformer with Depth-Wise LSTMs, arXiv 2007.06257.

    Args:
        z: (..., 4D), or (..., 3D) in the order i, f, o with ``hidden``; float32, float64, bfloat16 or float16.
        c: (..., D), the cell of the layer below; dtype of z, or float32 beside a 16-bit z. c_out has the dtype of c.
        weight, bias: (4, D), or (3, D) with ``hidden``; dtype of z, or float32 beside a 16-bit z; None for no affine.
        hidden: (..., D), dtype of z: g before dropout, in place of a g computed from z.
        norm: "gate" (statistics of each gate's D features), "joint" (of all gates), "none" (no LayerNorm, no affine).
        activation: "gelu" (erf), "gelu_tanh", "relu", "tanh", "silu" or "sigmoid"; not used with ``hidden``.
        eps: added to the biased variance.
        dropout_p: probability in [0, 1) with which an element of g is zeroed when ``training``.
        seed: int64 of shape (1,), the dropout mask's key; None draws it from torch's generator.
        backend: "auto", "reference", "cpp", "cuda" or "triton"; None for the default (:func:`set_backend`).

    Returns:
        h (..., D) in the dtype of z, and c_out (..., D) in the dtype of c.

    Raises:
        TypeError: an argument is not a floating-point tensor, or its dtype does not match z.
        ValueError: a shape, device, name or number is wrong, or the backend cannot run the call.
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
    """Run one step of the depth-wise LSTM: z = w [x ; h] + b, then :func:`depth_lstm_gates`, as one autograd node.

    [x ; h] is not built, and only z is kept between the product and the outputs. A decoding step of few rows without
    gradients is the exception: there building [x ; h] is faster. On CUDA such a step makes two products, and the gates
    add them up.

    Args:
        x: (..., I), or a tuple of tensors (..., I_1), (..., I_2), ... that stand for their concatenation.
        h, c: (..., D), output and cell of the layer below.
        w: (4D, I + D), or (3D, I + D) with ``hidden``; rows in the order i, f, o, g, columns x first.
        b: (4D), (3D) with ``hidden``, or None.
        left: a hint, the width of the next cell's input. Triton and CUDA in eager then make h the right part of a
            buffer (..., left + D) with a free left part. x can be written into it, and the next product reads [x ; h]
            in place. This h is not contiguous.

    x, h, w and hidden share one dtype; autocast casts them to its own. b, c, weight and bias may be float32 beside a
    16-bit dtype. The other arguments, returns and errors are those of :func:`depth_lstm_gates`.
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
    """Return the dropout mask's key for a call on ``like``; beside a DTensor all ranks share one key."""
    return sharding.replicated(reference.draw_seed(like.device) if seed is None else seed, like, source_rank=0)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    checks.check_float_tensor("x, h, w and hidden", tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
