"""The formulas of csrc/common/activations.h for Triton: sigmoid, activations with slopes, dropout's mask.

Everything is fp32. ``FAST`` is for 16-bit z, c and affine: its errors are about 5e-5, a tenth of an fp16 rounding. The
polynomials are those of activations.h. Exponentials are powers of two and reciprocals are squared reciprocal roots,
because each compiles to one instruction. On sm_90 sigmoid takes 5 instructions an element, 1 / (1 + exp(-x)) 12 and erf
29. The interpreter knows these functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def reciprocal(x):
    """Compute 1 / x for x >= 1, accurate to two units in the last place."""
    root = tl.math.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(a):
    return reciprocal(1.0 + tl.math.exp2(a * MINUS_LOG2_E))


@triton.jit
def normal_cdf_and_density(a, FAST: tl.constexpr):
    """Return the standard normal distribution's cumulative function and density.

    See normal() in csrc/common/activations.h.
    """
    half_density = tl.math.exp2(a * a * -0.72134752044448170)  # exp(-a^2 / 2)
    if FAST:
        t = reciprocal(1.0 + 0.33 * tl.abs(a))
        m = -0.0642068398 + t * 0.386598391
        m = 0.177593372 + t * m
    else:
        t = reciprocal(1.0 + 0.28 * tl.abs(a))
        m = 0.389872949 + t * -0.105807978
        m = -0.236991772 + t * m
        m = 0.268908808 + t * m
        m = 0.0674972889 + t * m
        m = 0.116520695 + t * m
    tail = m * t * half_density
    return tl.where(a < 0, tail, 1.0 - tail), half_density * 0.39894228040143268


@triton.jit
def normal_cdf(a, FAST: tl.constexpr):
    """Return the standard normal distribution's cumulative function alone."""
    if FAST:
        # a clamp would remove NaN; comparisons with NaN are false
        x = tl.where(a < -4.4, -4.4, tl.where(a > 4.4, 4.4, a))
        s = x * x
        p = 0.00213476805 + s * -1.91085691e-05
        p = 0.0455299943 + s * p
        p = 0.39873578 + s * p
        q = 0.279035214 + s * 0.0285111895
        q = 1.0 + s * q
        return 0.5 + x * p * reciprocal(q)
    else:
        cdf, _ = normal_cdf_and_density(a, FAST)
        return cdf


@triton.jit
def activate(a, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """Return act(a)."""
    if ACTIVATION == "gelu":
        return a * normal_cdf(a, FAST)
    elif ACTIVATION == "gelu_tanh":
        return a * sigmoid(a * (1.5957691216057308 + 0.071354816272600248 * (a * a)))
    elif ACTIVATION == "relu":
        return tl.where(a < 0, 0.0, a)
    elif ACTIVATION == "tanh":
        return 2.0 * sigmoid(2.0 * a) - 1.0
    elif ACTIVATION == "silu":
        return a * sigmoid(a)
    else:
        tl.static_assert(ACTIVATION == "sigmoid", "activate lacks an activation")
        return sigmoid(a)


@triton.jit
def activate_with_slope(a, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """Return act(a) and d act(a) / d a."""
    if ACTIVATION == "gelu":
        cdf, density = normal_cdf_and_density(a, FAST)
        return a * cdf, cdf + a * density
    elif ACTIVATION == "gelu_tanh":
        square = a * a
        s = sigmoid(a * (1.5957691216057308 + 0.071354816272600248 * square))
        value = a * s
        return value, s + value * (1.0 - s) * (1.5957691216057308 + 0.21406444881780074 * square)
    elif ACTIVATION == "relu":
        return tl.where(a < 0, 0.0, a), tl.where(a > 0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        s = sigmoid(2.0 * a)
        return 2.0 * s - 1.0, 4.0 * s * (1.0 - s)
    elif ACTIVATION == "silu":
        s = sigmoid(a)
        value = a * s
        return value, s + value * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "sigmoid", "activate_with_slope lacks an activation")
        s = sigmoid(a)
        return s, s * (1.0 - s)


@triton.jit
def dropout_factors(seed, row, first, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return ``scale`` where dropout keeps an element and 0 elsewhere.

    The result has rows ``row`` (ROWS, 1) and BLOCK features from ``first`` on. The generator is Philox4x32-10 (Salmon
    et al., SC 2011), with the counter and key of dropout_mask in depthlstm_fast/reference/depth_lstm.py. One block of
    four words serves four features, so a quarter of the tile is drawn and its words are interleaved.
    """
    block = (first // 4 + tl.arange(0, BLOCK // 4))[None, :]
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)
    row_high = (row >> 32).to(tl.uint32)
    zero = tl.zeros((ROWS, BLOCK // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32) + zero, row_low + zero, row_high + zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, BLOCK)
    return tl.where(words >= threshold.to(tl.uint32), scale, 0.0)
