"""The depth-wise LSTM step in plain PyTorch: the definition for every kernel.

    z   = W [x ; h'] + b                rows in the order i, f, o, g
    a_k = gamma_k * n_k + beta_k        n_k = (z_k - mean) / sqrt(var + eps)
    c   = sigmoid(a_f) * c' + sigmoid(a_i) * g,     g = dropout(act(a_g))
    h   = sigmoid(a_o) * c

Source: Xu et al., Rewiring the Transformer with Depth-Wise LSTMs, arXiv 2007.06257.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, sharding
from ..activations import FUNCTIONS, activate
from ..modes import autocast_dtype, constant


def draw_seed(device: torch.device) -> Tensor:
    """Draw a dropout seed, int64 of shape (1,), from torch's default generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_mask(seed: Tensor, rows: int, features: int, p: float) -> Tensor:
    """Return which elements dropout keeps, (rows, features) bool, as every backend computes them.

    The generator is Philox4x32-10 (Salmon et al., SC 2011). Element (n, d) reads word d % 4 of the block with key
    ``seed`` (low word first) and counter (d // 4, n mod 2^32, n // 2^32, 0). The element is kept where that word is at
    least p * 2^32.
    """
    low = 0xFFFFFFFF
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    block = torch.arange((features + 3) // 4, device=seed.device).unsqueeze(0)
    x0, x1, x2, x3 = torch.broadcast_tensors(block, row & low, row >> 32, torch.zeros_like(row))
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # wraps in int64; the low 64 bits are right
        x0, x1, x2, x3 = (
            ((product1 >> 32) & low) ^ x1 ^ key0,
            product1 & low,
            ((product0 >> 32) & low) ^ x3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    words = torch.stack((x0, x1, x2, x3), dim=-1).flatten(1)[:, :features]
    return words >= int(p * 2**32)


def _drop(g: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    keep = dropout_mask(seed, g.numel() // g.shape[-1], g.shape[-1], dropout_p).view(g.shape)
    keep = sharding.replicated(keep, g, source_rank=0)
    return torch.where(keep, g / (1 - dropout_p), torch.zeros((), dtype=g.dtype, device=g.device))


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
) -> tuple[Tensor, Tensor]:
    """Compute :func:`depthlstm_fast.depth_lstm_gates` in plain PyTorch; differentiable any number of times."""
    checks.check_options(norm, activation, eps, dropout_p, training)
    checks.check_gates(z, c, weight, bias, hidden, norm, seed)
    gates, features = 4 if hidden is None else 3, constant(c.shape[-1])
    a = z.unflatten(-1, (gates, features))
    if norm == "gate":
        a = F.layer_norm(a, (features,), None, None, eps)
        if weight is not None and bias is not None:
            a = a * weight + bias
    elif norm == "joint":
        # layer_norm needs an affine in the dtype of z or in fp32
        a = F.layer_norm(a, (gates, features), weight, bias, eps)
    input_gate, forget_gate, output_gate = torch.sigmoid(a[..., :3, :]).unbind(-2)
    g = activate(a[..., 3, :], activation) if hidden is None else hidden
    if training and dropout_p > 0:
        g = _drop(g, dropout_p, draw_seed(z.device) if seed is None else seed)
    new_c = forget_gate * c + input_gate * g
    return (output_gate * new_c).to(z.dtype), new_c.to(c.dtype)


def depth_lstm_gates_backward(
    dh: Tensor,
    dc: Tensor,
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
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Compute the backward pass that the kernels follow.

    It starts from the kept tensors: z, c, the affine and the dropout seed. Shapes are those of the forward pass.
    Dropout is applied if a seed is given. Everything is computed in z's dtype.

    Returns:
        (dz, dhidden, dc', dweight, dbias); dhidden, dweight and dbias are None where their input is.
    """
    features = c.shape[-1]
    a = z.unflatten(-1, (-1, features))
    dims = (-1,) if norm == "gate" else (-2, -1)
    if norm != "none":
        centred = a - a.mean(dims, keepdim=True)
        r = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
        n = a = centred * r
        if weight is not None and bias is not None:
            a = n * weight + bias
    i, f, o = torch.sigmoid(a[..., :3, :]).unbind(-2)
    g = activate(a[..., 3, :], activation) if hidden is None else hidden
    kept = torch.ones_like(g)
    if seed is not None:
        kept = _drop(kept, dropout_p, seed)
    new_c = f * c + i * g * kept

    t = dc + dh * o
    da = [t * g * kept * i * (1 - i), t * c * f * (1 - f), dh * new_c * o * (1 - o)]
    dg = t * i * kept
    if hidden is None:
        da.append(dg * FUNCTIONS[activation].slope(a[..., 3, :]))
    dz = u = torch.stack(da, -2)
    rows = tuple(range(u.dim() - 2))
    dweight = dbias = None
    if norm != "none":
        if weight is not None:
            dweight, dbias = (u * n).sum(rows), u.sum(rows)
            u = u * weight
        dz = r * (u - u.mean(dims, keepdim=True) - n * (u * n).mean(dims, keepdim=True))
    return dz.flatten(-2), None if hidden is None else dg, t * f, dweight, dbias


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
) -> tuple[Tensor, Tensor]:
    """Compute :func:`depthlstm_fast.depth_lstm_cell` in plain PyTorch."""
    inputs = x if isinstance(x, tuple) else (x,)
    checks.check_options(norm, activation, eps, dropout_p, training)
    checks.check_float_tensor("h", h)
    autocast = autocast_dtype(h.device.type) is not None
    if not autocast:
        checks.check_cell(inputs, h, c, w, b, weight, bias, hidden, norm, seed)
    z = F.linear(torch.cat((*inputs, h), dim=-1), w, None if b is None else b.to(w.dtype))
    if hidden is not None and autocast:
        checks.check_float_tensor("hidden", hidden)
        hidden = hidden.to(z.dtype)
    return depth_lstm_gates(
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
