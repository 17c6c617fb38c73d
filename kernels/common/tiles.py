"""Building blocks of the Triton kernels: tiles (ROWS, BLOCK) of several gates, their row means, LayerNorm.

Values of the gates i, f, o, g are a tuple of four tiles, or of three if `hidden` gives g. Everything is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def row_means(x, SETS: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr, GATES: tl.constexpr):
    """Return means over the features of SETS * GATES tiles, (ROWS, 1) each.

    With norm="joint" the means are over the features of all gates.
    """
    if SETS * GATES == 3:
        sums = tl.reduce(x, 1, _add3, keep_dims=True)
    elif SETS * GATES == 4:
        sums = tl.reduce(x, 1, _add4, keep_dims=True)
    elif SETS * GATES == 6:
        sums = tl.reduce(x, 1, _add6, keep_dims=True)
    else:
        sums = tl.reduce(x, 1, _add8, keep_dims=True)
    means = ()
    for first in tl.static_range(0, SETS * GATES, GATES):
        if NORM == "joint":
            total = sums[first] + sums[first + 1] + sums[first + 2]
            if GATES == 4:
                total += sums[first + 3]
            for _ in tl.static_range(GATES):
                means = means + (total * (1.0 / (GATES * FEATURES)),)
        else:
            for k in tl.static_range(GATES):
                means = means + (sums[first + k] * (1.0 / FEATURES),)
    return means


@triton.jit
def load(at, inside, MASKED: tl.constexpr):
    """Load a tile in fp32, with zeros outside."""
    if MASKED:
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit
def store(at, value, inside, MASKED: tl.constexpr):
    value = value.to(at.dtype.element_ty)
    if MASKED:
        tl.store(at, value, mask=inside)
    else:
        tl.store(at, value)


@triton.jit
def load_key(seed):
    """Return the dropout seed as a number; None if there is none."""
    key = None
    if seed is not None:
        key = tl.load(seed)
    return key


@triton.jit
def load_gates(at, inside, FEATURES: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr):
    """Load the gates' tiles, which lie FEATURES apart, from z or from a (GATES, FEATURES) parameter."""
    tiles = ()
    for k in tl.static_range(GATES):
        tiles = tiles + (load(at + k * FEATURES, inside, MASKED),)
    return tiles


@triton.jit
def load_z(
    z,
    z_bias,
    z_stride,
    row,
    column,
    inside,
    rows,
    FEATURES: tl.constexpr,
    GATES: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load z + z_bias; ``rows`` is never 0."""
    tiles = load_gates(z + row * z_stride + column, inside, FEATURES, GATES, MASKED)
    if z_bias is not None:
        biases = zeros(GATES, 1, BLOCK)
        if rows > 0:  # as in load_affine
            biases = load_gates(z_bias + column, column < FEATURES, FEATURES, GATES, MASKED)
        tiles = add_tiles(tiles, biases, GATES)
    return tiles


@triton.jit
def products(x, y, GATES: tl.constexpr):
    products = ()
    for k in tl.static_range(GATES):
        products = products + (x[k] * y[k],)
    return products


@triton.jit
def add_tiles(x, y, COUNT: tl.constexpr):
    sums = ()
    for k in tl.static_range(COUNT):
        sums = sums + (x[k] + y[k],)
    return sums


@triton.jit
def centre(z, mean, inside, GATES: tl.constexpr, MASKED: tl.constexpr):
    """Return z - mean, with zeros outside."""
    centred = ()
    for k in tl.static_range(GATES):
        tile = z[k] - mean[k]
        if MASKED:
            tile = tl.where(inside, tile, 0.0)
        centred = centred + (tile,)
    return centred


@triton.jit
def scale_and_shift(rest, eps, GATES: tl.constexpr):
    """Return (r, shift) with n = (z - mean) r + shift, from the means of z - mean and of its square.

    The shift takes out the rounding error of the mean. On a nearly constant row this error is most of z - mean, and r =
    1 / sqrt(eps) would blow it up.
    """
    r, shift = (), ()
    for k in tl.static_range(GATES):
        variance = rest[GATES + k] - rest[k] * rest[k]
        variance = tl.where(variance < 0, 0.0, variance)  # not a maximum, because NaN must stay
        r = r + (tl.math.rsqrt(variance + eps),)
        shift = shift + (-rest[k] * r[k],)
    return r, shift


@triton.jit
def row_statistics(
    z, inside, eps, FEATURES: tl.constexpr, NORM: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr
):
    """Return (mean, r, shift) of the gates, (ROWS, 1) each."""
    mean = row_means(z, 1, FEATURES, NORM, GATES)
    centred = centre(z, mean, inside, GATES, MASKED)
    r, shift = scale_and_shift(
        row_means(centred + products(centred, centred, GATES), 2, FEATURES, NORM, GATES), eps, GATES
    )
    return mean, r, shift


@triton.jit
def normalise(z, mean, r, shift, inside, GATES: tl.constexpr, MASKED: tl.constexpr):
    """Return n of each gate, with 0 outside if MASKED.

    A column outside has gradient 0. A NaN beside it would make a row's sums NaN.
    """
    n = ()
    for k in tl.static_range(GATES):
        tile = (z[k] - mean[k]) * r[k] + shift[k]
        if MASKED:
            tile = tl.where(inside, tile, 0.0)
        n = n + (tile,)
    return n


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, BLOCK), tl.float32),)
    return tiles


@triton.jit
def load_affine(
    weight, bias, column, rows, FEATURES: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Load the tiles (1, BLOCK) of weight and of bias.

    ``rows`` is never 0. The branch keeps the loads out of the pipeline. In a loop with stages Triton would copy the
    affine with every row into shared memory, past the L1 cache (cp.async.cg, seen in the machine code for sm_90). That
    is 32D bytes a row from L2, where everything else is 24D from memory.
    """
    weights, biases = zeros(GATES, 1, BLOCK), zeros(GATES, 1, BLOCK)
    if rows > 0:
        weights = load_gates(weight + column, column < FEATURES, FEATURES, GATES, MASKED)
        biases = load_gates(bias + column, column < FEATURES, FEATURES, GATES, MASKED)
    return weights, biases


@triton.jit
def apply_affine(n, weights, biases, GATES: tl.constexpr):
    a = ()
    for k in tl.static_range(GATES):
        a = a + (n[k] * weights[k] + biases[k],)
    return a


@triton.jit
def layer_norm_backward(u, n, r, mean_u, mean_un, GATES: tl.constexpr):
    dz = ()
    for k in tl.static_range(GATES):
        dz = dz + ((u[k] - mean_u[k] - n[k] * mean_un[k]) * r[k],)
    return dz
