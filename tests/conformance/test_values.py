"""Values and gradients of every op on every path against fp64: the error bound at the sizes beside each boundary."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, Types, assert_bound, double, normal, results
from suite import (
    FULL,
    HALF,
    HALF16,
    MIXED,
    MIXED16,
    Op,
    Path,
    Variant,
    cases,
    check,
    dropout,
    fused,
    make,
    plain,
    run,
    surrounded,
)
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.ops.depth_lstm import ACTIVATION_CODES, NORM_CODES, Options
from depthlstm_fast.ops.depth_lstm_autograd import gates

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows


# A full cross product on purpose. On the CPU (types, activation) is one compiled kernel. In Triton every call is a
# kernel, with the formulas of fp32 and with those of 16-bit results. On CUDA norm and activation are branches. Triton's
# wide scheme shares its formulas with the narrow one.
def every_kernel(op: Op, path: Path) -> Iterable[tuple[Types, Variant]]:
    return itertools.product(path.every_kernel, op.variants if path.name == "wide" else op.every_variant)


@cases("types, variant", every_kernel)
def test_error_bound(op: Op, path: Path, types: Types, variant: Variant) -> None:
    check(op, path, *make(op, path, *path.sizes, types, variant))


# Types decide how memory is read and written. Dropout adds one more operand.
@cases(
    "types, variant",
    lambda op, path: itertools.product(path.types, op.variants[:1] if path.name == "wide" else op.variants),
)
def test_types(op: Op, path: Path, types: Types, variant: Variant) -> None:
    """Check that h takes z's type and c keeps its own: an fp32 cell stays in fp32 over depth."""
    tensors, options = make(op, path, *path.sizes, types, variant)
    found = check(op, path, tensors, {**options, **dropout(op, path)})
    if op.name == "depth_lstm":
        assert (found["h"].dtype, found["c_out"].dtype) == (types.z, types.c)


# Each shape of call at each size on the CPU. Elsewhere the shape rotates, so that neighbouring sizes differ in it.
def sizes(op: Op, path: Path) -> Iterable[tuple[int, Types, Variant]]:
    if path.native:
        # the other memory types have their own code for the last, partial vector
        others = itertools.product([1, 2, 3, 7, 31, 33, 65, 129, 512, 1000], path.main[1:4], op.variants[:1])
        return itertools.chain(itertools.product(path.features, path.among(FULL, MIXED), op.variants), others)
    shapes = [(size, op.variants[place % len(op.variants)]) for place, size in enumerate(path.features)]
    return [(size, types, variant) for size, variant in shapes for types in path.among(FULL, MIXED)]


@cases("features, types, variant", sizes)
def test_features(op: Op, path: Path, features: int, types: Types, variant: Variant) -> None:
    # few rows in fp64: with D=2 a row of two nearly equal numbers has a gradient without digits
    rows = path.rows_of(features) if types in (FULL, MIXED) else 5
    check(op, path, *make(op, path, rows, features, types, variant))


@cases("rows, features", lambda op, path: path.rows)
def test_rows(op: Op, path: Path, rows: int, features: int) -> None:
    found = check(op, path, *make(op, path, rows, features, FULL, op.variants[0]))
    if rows == 0:
        assert not any(found[name].any() for name in op.sums if name in found)


@cases(
    "shape, variant",
    lambda op, path: itertools.product([(), (0,), (2, 0, 3), (2, 3), (2, 1, 3), (1, 2, 1, 2)], op.variants[:3:2]),
    one_path=True,
)
def test_leading_shapes(op: Op, path: Path, shape: tuple[int, ...], variant: Variant) -> None:
    found = check(op, path, *make(op, path, shape, 9, FULL, variant))
    assert all(found[name].shape == (*shape, 9) for name in op.outputs)
    if 0 in shape:
        assert not any(found[name].any() for name in op.sums if name in found)


# an eps that matters (0.5 beside a variance of 2), a negligible eps, and an eps beyond fp16
@cases(
    "norm, eps, types",
    lambda op, path: itertools.product(
        ["gate", "joint"], [0.0, 1e-12, 0.5, 1e6], [FULL, HALF16] if path.native else [FULL]
    ),
    only="depth_lstm",
)
def test_eps(op: Op, path: Path, norm: str, eps: float, types: Types) -> None:
    tensors, options = make(op, path, path.sizes[0], path.sizes[1], types, (norm, True, "gelu"))
    check(op, path, tensors, {**options, "eps": eps})


@cases(one_path=True, only="depth_lstm")
def test_names_differ(op: Op, path: Path) -> None:
    """Check for swapped names: a name with another's code could agree with a reference that has the same mistake."""
    tensors, _ = make(op, path, 5, 16, FULL, ("gate", False, "gelu"))
    outputs = [fused(op, path, **tensors, norm=norm)[0] for norm in dl.checks.NORMS]
    outputs += [fused(op, path, **tensors, activation=name)[0] for name in dl.checks.ACTIVATIONS[1:]]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-5  # the two GELUs differ by up to 5e-4


def fp32_beside_16_bits(op: Op, path: Path) -> list[Types]:
    found = [types for types in path.types if types.z in (BF16, F16) and F32 in types]
    return [types for types in found if types.c == F32 or not op.rounds_streams]


@cases("types", fp32_beside_16_bits)
def test_fp32_results_beside_16_bit_ones(op: Op, path: Path, types: Types) -> None:
    """Check that results in fp32 have the accuracy of fp32.

    Eager's own errors in 16 bits would not require it.
    """
    tensors, options = make(op, path, *path.sizes, types, op.variants[0])
    grads = op.cotangents(tensors)
    exact = plain(op, tensors, grads, exact=True, **options)
    for key, value in run(op, path, tensors, grads, **options).items():
        if value.dtype == F32:
            error = (value - exact[key]).abs().max() / exact[key].abs().max()
            # a rounding to fp16 is 5e-4, the formulas for 16-bit results are 5e-5
            assert error < 1e-5, f"{key}: {error:.2g}"


@cases(only="depth_lstm")
def test_slope_of_relu_at_zero(op: Op, path: Path) -> None:
    """Check for 0, as in torch: exact zeros are common inputs of ReLU."""
    rows, features = path.sizes
    tensors, options = make(op, path, rows, features, FULL, ("none", False, "relu"))
    tensors["z"][:, 3 * features :] = 0
    assert not check(op, path, tensors, options)["dz"][:, 3 * features :].any()


def check_z_bias(op: Op, path: Path, types: Types, variant: Variant, dtype: torch.dtype, shift: float = 0.0) -> None:
    tensors, options = make(op, path, *path.sizes, types, variant)
    tensors["z_bias"] = normal(tensors["z"].shape[1], dtype=dtype, shift=shift).to(tensors["z"].device)
    codes = Options(NORM_CODES[options["norm"]], ACTIVATION_CODES[options["activation"]], 1e-6, 0.0)
    grads = op.cotangents(tensors)

    def by_operator(
        z: Tensor, c: Tensor, z_bias: Tensor, weight: Any = None, bias: Any = None, hidden: Any = None
    ) -> Any:
        return gates(z, z_bias, hidden, c, weight, bias, None, codes, path.backend)

    def unfused(z: Tensor, c: Tensor, z_bias: Tensor, **others: Any) -> Any:
        return dl.reference.depth_lstm_gates(z + z_bias.to(z.dtype), c, **others, **options)

    exact = results(unfused, double(tensors), (grads[0].double(), grads[1].double()))
    assert_bound(results(by_operator, surrounded(tensors), grads), results(unfused, tensors, grads), exact, shift)


@cases("types, variant", lambda op, path: itertools.product([FULL, MIXED, HALF], op.variants), only="depth_lstm")
def test_z_bias(op: Op, path: Path, types: Types, variant: Variant) -> None:
    """Check that the operator with z_bias is the function of z + z_bias.

    The bias's gradient is the sum of z's over the rows.
    """
    check_z_bias(op, path, types, variant, types.affine)


OTHER_BIASES = [(MIXED, BF16), (Types(BF16, F32, BF16), F32), (MIXED16, F16), (HALF16, F32)]


@cases("types, dtype", lambda op, path: OTHER_BIASES, only="depth_lstm")
def test_z_bias_of_another_type_than_the_affine(op: Op, path: Path, types: Types, dtype: torch.dtype) -> None:
    check_z_bias(op, path, types, op.variants[0], dtype)


@cases("norm", lambda op, path: ["gate", "joint"], only="depth_lstm")
def test_large_z_bias(op: Op, path: Path, norm: str) -> None:
    """Check that each pass over a row reads z + z_bias.

    The shift must take out the rounding error of the same mean.
    """
    check_z_bias(op, path, FULL, (norm, True, "gelu"), F32, shift=1e4)


@cases("variant", lambda op, path: op.every_variant if F64 in [types.z for types in path.types] else [])
def test_gradcheck_of_the_kernel(op: Op, path: Path, variant: Variant) -> None:
    tensors, options = make(op, path, (2, 2), 5, Types(F64, F64, F64), variant)
    options.update(dropout(op, path) if variant == op.variants[0] else {})
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return fused(op, path, **dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])
