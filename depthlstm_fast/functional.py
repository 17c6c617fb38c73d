"""The functions of the public API.

Each function checks its arguments, chooses a backend and makes the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, sharding
from .backends.choice import choose
from .modes import autocast_dtype
from .ops import depth_gru_gates as depth_gru_gates_op
from .ops import depth_lstm_autograd
from .ops import layer_attend as layer_attend_op
from .ops import layer_mix as layer_mix_op
from .ops import norm_step as norm_step_op
from .ops import siamese_step as siamese_step_op
from .ops.depth_lstm import ACTIVATION_CODES, NAME, NORM_CODES, Options
from .ops.sources import leading
from .reference import depth_gru_gates as reference_depth_gru_gates
from .reference import depth_lstm as reference
from .reference import layer_attend as reference_layer_attend
from .reference import layer_mix as reference_layer_mix
from .reference import norm_step as reference_norm_step
from .reference import siamese_step as reference_siamese_step


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
    checks.check_options(norm, activation, eps, dropout_p, training)
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
    checks.check_options(norm, activation, eps, dropout_p, training)
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


def norm_step(
    x: Tensor,
    y: Tensor,
    *,
    a: float = 1.0,
    b: float | Tensor = 1.0,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    weight3: Tensor | None = None,
    bias3: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """A residual connection with its norms: x' = [N1](a x + b [N3] y), u = [N2] x'.

    Pre-norm (Xiong et al., arXiv 2002.04745) has N2, the next branch's norm. Post-norm (Vaswani et al., 2017) has N1.
    Sandwich-norm (Ding et al., arXiv 2105.13290) has N2 and N3. DeepNorm (Wang et al., arXiv 2203.00555) has N1 and
    a > 1. Keel (arXiv 2601.19895) has N1, N2 and a > 1. ReZero (arXiv 2003.04887) and LayerScale (arXiv 2103.17239)
    are pre-norm with a learned b.

    Args:
        x: (..., C), the residual stream; float32, float64, bfloat16 or float16, or float32 beside a 16-bit y.
        y: (..., C), the branch's output.
        a: a number.
        b: a number, or a tensor () or (C,); dtype of y, or float32 beside a 16-bit y.
        weight1, bias1: (C,), the affine of N1; dtypes as for b. Without a weight there is no N1; the bias is optional.
        weight2, bias2, weight3, bias3: as weight1 and bias1, of N2 and N3.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm, without biases).
        eps: added to the biased variance, or to the mean square.

    Returns:
        x' (..., C) in the dtype of x, and u (..., C) in the dtype of y; without N2, u is x' itself. Everything is
        computed in float32 (float64 for float64), and N2 normalises x' as it was rounded.

    Raises:
        TypeError: an argument is no floating-point tensor, or of a dtype that does not go with y.
        ValueError: a shape, device, name or number is not what is wanted.
    """
    checks.check_norm_step(x, y, a, b, (("1", weight1, bias1), ("2", weight2, bias2), ("3", weight3, bias3)), norm, eps)
    chosen = choose(None, y, norm_step_op.NAME, y.shape[-1])
    if chosen == "reference":
        return reference_norm_step(
            x, y, a=a, b=b, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, weight3=weight3, bias3=bias3,
            norm=norm, eps=eps,
        )  # fmt: skip
    scale, number = (b, 1.0) if isinstance(b, Tensor) else (None, float(b))
    parameters = norm_step_op.Parameters(scale, weight1, bias1, weight2, bias2, weight3, bias3)
    options = norm_step_op.Options(float(a), number, norm_step_op.NORM_CODES[norm], float(eps))
    return norm_step_op.norm_step(x, y, parameters, options, chosen)


def siamese_step(
    x: Tensor,
    y: Tensor,
    o: Tensor,
    weight_x: Tensor,
    bias_x: Tensor | None,
    weight_y: Tensor,
    bias_y: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    c: float,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of SiameseNorm's two streams: X' = N_x(X + o / c), Y' = Y + o, u = [N](X' + N_y Y').

    Source: arXiv 2602.08064.

    Args:
        x, y: (..., C), the two streams; the dtype of o, or float32 beside a 16-bit o. The fused kernels take streams of
            one dtype.
        o: (..., C), the branch's output; float32, float64, bfloat16 or float16.
        weight_x, bias_x, weight_y, bias_y: (C,), the affines of N_x and N_y; dtype of o, or float32 beside a 16-bit o.
        weight, bias: (C,), the affine of N, the next branch's norm. Without a weight there is no N.
        c: a number above 0.
        norm, eps: see :func:`norm_step`.

    Returns:
        X' and Y' (..., C) in the dtypes of x and y, and u (..., C) in the dtype of o.

    Raises:
        TypeError, ValueError: as :func:`norm_step`.
    """
    affines = (("_x", weight_x, bias_x), ("_y", weight_y, bias_y), ("", weight, bias))
    checks.check_siamese_step(x, y, o, c, affines, norm, eps)
    chosen = choose(None, o, siamese_step_op.NAME, o.shape[-1], siamese_step_op.why_not(x, y))
    if chosen == "reference":
        return reference_siamese_step(
            x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias, c=c, norm=norm, eps=eps
        )
    tensors = siamese_step_op.Tensors(x, y, o, weight_x, bias_x, weight_y, bias_y, weight, bias)
    options = siamese_step_op.Options(float(c), siamese_step_op.NORM_CODES[norm], float(eps))
    return siamese_step_op.siamese_step(tensors, options, chosen)


def depth_gru_gates(
    z: Tensor,
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    reset_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What follows the products of one depth-wise GRU step: h' = (1 - u) * n + u * h.

    z holds r, u, n, m: reset, update, new and the state's part of new, the last of h alone. Then r and u are sigmoids,
    and n = tanh(a_n + r * a_m), the reset after the product. With ``reset_weight`` z holds r, u, n, and
    n = tanh(a_n + reset_weight (r * h)), the reset before the product. This form runs on the reference alone: it has a
    matrix product between its gates.
    Sources: Wei et al., ACL 2020; :class:`torch.nn.GRUCell` (after); GTrXL, arXiv 1910.06764, section 3.2 (before).

    Args:
        z: (..., 4C), or (..., 3C) with ``reset_weight``; float32, float64, bfloat16 or float16.
        h: (..., C), the state of the layer below; dtype of z, or float32 beside a 16-bit z.
        weight, bias: (4, C) or (3, C), the affine of a LayerNorm over each gate's C features; both None for none.
        reset_weight: (C, C); dtype of z, or float32 beside a 16-bit z.
        eps: added to the biased variance.

    Returns:
        h' (..., C) in the dtype of h. Everything is computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as :func:`norm_step`, or the default backend cannot run the call.
        RuntimeError: double backward through a fused backend.
    """
    checks.check_depth_gru_gates(z, h, weight, bias, reset_weight, eps)
    against = None if reset_weight is None else depth_gru_gates_op.RESET_BEFORE
    chosen = choose(None, z, depth_gru_gates_op.NAME, h.shape[-1], against, without_kernels=True)
    if chosen == "reference":
        return reference_depth_gru_gates(z, h, weight, bias, reset_weight=reset_weight, eps=eps)
    return depth_gru_gates_op.depth_gru_gates(z, h, weight, bias, float(eps), chosen)


def layer_mix(sources: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    """Weighted sums over a list of tensors: u_v = sum_l weights[v, l] sources[l].

    Sources: DLCL (Wang et al., ACL 2019, equation 7), DenseFormer (arXiv 2402.02622), transparent attention (Bapna et
    al., EMNLP 2018).

    Args:
        sources: L tensors (..., C) of one shape; float32, float64, bfloat16 or float16.
        weights: (V, L), any of these dtypes.

    Returns:
        V tensors (..., C) in the widest dtype of the sources, summed in their order in float32 (float64 for float64).

    Raises:
        TypeError: an argument is no floating-point tensor, or sources is no list or tuple.
        ValueError: a shape or device is not what is wanted, or there is no source.
    """
    checks.check_layer_mix(sources, weights)
    chosen = choose(None, leading(sources), layer_mix_op.NAME, sources[0].shape[-1])
    if chosen == "reference" or weights.shape[0] == 0:
        return reference_layer_mix(sources, weights)
    return layer_mix_op.layer_mix(list(sources), weights, chosen)


def layer_attend(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """Attention over a list of tensors by a learned query: u = [N](sum_l softmax_l(query . RMSNorm(x_l)) x_l).

    There is no 1/sqrt(C); a zero query gives the mean. Source: Attention Residuals, arXiv 2603.15031.

    Args:
        sources: L tensors (..., C) of one shape; float32, float64, bfloat16 or float16.
        query: (C,), any of these dtypes.
        key_weight: (C,), the weight of the keys' RMSNorm; None for ones.
        weight, bias: (C,), the affine of N. Without a weight there is no N.
        norm: the kind of N, "layer" or "rms" (without a bias).
        eps: of both norms.

    Returns:
        u (..., C) in the widest dtype of the sources; everything is computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as :func:`layer_mix`.
    """
    checks.check_layer_attend(sources, query, key_weight, weight, bias, norm, eps)
    chosen = choose(None, leading(sources), layer_attend_op.NAME, sources[0].shape[-1])
    if chosen == "reference":
        return reference_layer_attend(sources, query, key_weight, weight, bias, norm=norm, eps=eps)
    parameters = layer_attend_op.Parameters(query, key_weight, weight, bias)
    options = layer_attend_op.Options(layer_attend_op.NORM_CODES[norm], float(eps))
    return layer_attend_op.layer_attend(list(sources), parameters, options, chosen)
