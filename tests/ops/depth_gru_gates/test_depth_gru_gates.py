"""The gates of the depth-wise GRU: difficult numbers, layouts, and calls that the public checks do not see.

tests/conformance has values, dtypes, sizes and autograd.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import op_depth_gru_gates
import pytest
import torch
from helpers import BF16, F16, F32, HAS_CPP, HAS_TRITON, Types, assert_bound, double, needs_cpp, normal, results
from op_depth_gru_gates import arguments, cotangents, function, reference
from torch import Tensor

import depthlstm_fast as dl

BACKENDS = [name for name, has in (("cpp", HAS_CPP), ("triton", HAS_TRITON)) if has]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ops = torch.ops.depthlstm_fast
OUTPUTS = op_depth_gru_gates.OP.outputs
FULL, HALF, HALF16 = Types(F32, F32, F32), Types(BF16, BF16, BF16), Types(F16, F16, F16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows


def three(
    backend: str, tensors: dict[str, Tensor], grads: tuple[Tensor, ...], **options: Any
) -> tuple[dict[str, Tensor], ...]:
    """Return the results of the kernels, of eager in the same dtypes, and in fp64."""
    found = results(functools.partial(function, backend=backend), tensors, grads, OUTPUTS, **options)
    assert dl.last_backend() == backend
    eager = results(reference, tensors, grads, OUTPUTS, **options)
    return found, eager, results(reference, double(tensors), tuple(g.double() for g in grads), OUTPUTS, **options)


def check(
    backend: str, tensors: dict[str, Tensor], grads: tuple[Tensor, ...] | None = None, condition: float = 0.0, **o: Any
) -> dict[str, Tensor]:
    found = three(backend, tensors, cotangents(tensors) if grads is None else grads, **o)
    assert_bound(*found, condition)
    return found[0]


@each_backend
@pytest.mark.parametrize("types", [FULL, HALF, HALF16], ids=str)
@pytest.mark.parametrize("features", [33, 512])
def test_mean_far_beyond_deviation(backend: str, types: Types, features: int) -> None:
    """Check rows whose E[x^2] - E[x]^2 has no digit left; fp16 ends at 6.5e4."""
    ratios = [1e2, 1e3, 1e4, 1e5, 1e6][: 3 if types.z == F16 else 5]
    tensors, _ = arguments(len(ratios), features, types)
    tensors["z"] = (normal(len(ratios), 4 * features) + torch.tensor(ratios).unsqueeze(1)).to(types.z)
    found = three(backend, tensors, cotangents(tensors))
    for row, ratio in enumerate(ratios):
        assert_bound(*({key: values[key][row] for key in ("h_out", "dz", "dh")} for values in found), ratio)
    assert_bound(*({key: values[key] for key in ("dweight", "dbias")} for values in found), max(ratios))


@each_backend
@pytest.mark.parametrize("features", [1, 2, 41, 300, 512])
def test_constant_rows(backend: str, features: int) -> None:
    """Check n = 0, where 1/sqrt(eps) = 1000 multiplies the rounding error of the mean."""
    values = [0.0, 1.0, 0.3, 1000.3, -6.5e4]
    tensors, _ = arguments(len(values), features, FULL)
    tensors["z"] = torch.tensor(values).unsqueeze(1).expand(-1, 4 * features).contiguous()
    found = three(backend, tensors, cotangents(tensors))
    for row in range(len(values)):
        assert_bound(*({key: value[row] for key, value in each.items() if key in ("h_out", "dh")} for each in found))
    assert_bound(*({"dbias": each["dbias"]} for each in found))
    # n = 0 makes dz the rest of cancelling terms and dweight 0, for which a relative bound has no scale
    for key in ("dz", "dweight"):
        largest = [(each[key].double() - found[2][key]).abs().max().item() for each in found[:2]]
        assert largest[0] <= 2 * largest[1] + 8 * torch.finfo(F32).eps * max(1.0, found[2][key].abs().max().item()), key


@each_backend
def test_constant_rows_of_huge_numbers(backend: str) -> None:
    """Check 2^119: (0 - mean) / sqrt(eps) is infinite, and must not be taken for a feature past the last.

    With three features the mean is exact.
    """
    tensors, _ = arguments(2, 3, FULL)
    tensors["z"] = torch.full_like(tensors["z"], 2.0**119)
    found, _, exact = three(backend, tensors, cotangents(tensors))  # eager is NaN
    for key in ("h_out", "dh", "dbias", "dweight"):
        torch.testing.assert_close(found[key].double(), exact[key], rtol=1e-5, atol=1e-6)


@each_backend
def test_nearly_constant_rows(backend: str) -> None:
    """Check one element a little off: the variance is of the order of eps."""
    tensors, _ = arguments(5, 33, FULL)
    tensors["z"] = torch.full_like(tensors["z"], 0.5)
    tensors["z"][:, ::33] = 0.5 + 2**-7
    check(backend, tensors, condition=100)


@each_backend
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5, 1e6])
def test_eps(backend: str, eps: float) -> None:
    tensors, _ = arguments(5, 33, FULL)
    check(backend, tensors, eps=eps)


@each_backend
@pytest.mark.parametrize("types", [FULL, HALF, HALF16], ids=str)
def test_values_near_the_largest_of_fp16(backend: str, types: Types) -> None:
    """Check numbers whose squares and sums exceed fp16 by far; the results are ordinary numbers."""
    tensors, _ = arguments(5, 33, types)
    signs = torch.randn(tensors["z"].shape).sign()
    tensors["z"] = (signs * 6.4e4 + normal(*signs.shape, scale=500)).clamp(-65504, 65504).to(types.z)
    found = check(backend, tensors)
    assert all(value.isfinite().all() for value in found.values())


@each_backend
@pytest.mark.parametrize("types", [FULL, HALF, HALF16], ids=str)
def test_saturated_gates(backend: str, types: Types) -> None:
    """Check gates without a norm: far from zero exp overflows or underflows, and no result may be NaN."""
    steps = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 4.3, 9.0, 17.0, 38.0, 44.0, 88.0, 89.0, 104.0, 720.0, 6e4])
    a = torch.cat((steps, -steps)).double()
    grid = torch.stack([x.flatten() for x in torch.meshgrid(a, a, indexing="ij")])
    tensors, _ = arguments(1, grid.shape[1], types, False)
    # r and n run along one axis, u and m along the other
    tensors["z"] = torch.cat((grid[0], grid[1], grid[0].flip(0), grid[1].flip(0))).to(types.z).unsqueeze(0)
    found = check(backend, tensors)
    assert all(value.isfinite().all() for value in found.values())


@each_backend
@pytest.mark.parametrize("normed", [False, True])
def test_nan_and_infinity_stay_where_they_belong(backend: str, normed: bool) -> None:
    """Check each special value in each place: results are NaN or infinite exactly where the reference's are."""
    specials, features = [torch.nan, torch.inf, -torch.inf], 21
    for types in (FULL, HALF, HALF16):
        tensors, _ = arguments(5 * len(specials), features, types, normed)
        for number, special in enumerate(specials):
            for gate in range(4):
                tensors["z"][5 * number + gate, gate * features + 3] = special
            tensors["h"][5 * number + 4, 3] = special
        (found,), (wanted,) = function(backend=backend, **tensors), reference(**double(tensors))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.double()[wanted.isinf()], wanted[wanted.isinf()])


@each_backend
def test_a_nan_gradient_stays_in_its_row(backend: str) -> None:
    """Check that it also stays in its column of the parameters' gradients."""
    tensors, _ = arguments(5, 21, FULL)
    (grad,) = cotangents(tensors)
    before = three(backend, tensors, (grad,))[0]
    grad = grad.clone()
    grad[2, 3] = torch.nan
    after = three(backend, tensors, (grad,))[0]
    others, clean = torch.arange(5) != 2, torch.arange(21) != 3
    for key in ("dz", "dh"):
        assert torch.equal(after[key][others], before[key][others])
        assert after[key][2].isnan().any()
    for key in ("dweight", "dbias"):
        assert after[key][:, 3].isnan().all()
        assert torch.equal(after[key][:, clean], before[key][:, clean])


# weight and bias have a dtype each, beside z
@each_backend
@pytest.mark.parametrize("dtypes", [(BF16, F32, BF16), (F16, F16, F32), (BF16, BF16, F32)], ids=str)
def test_affines_of_two_dtypes(backend: str, dtypes: tuple[torch.dtype, ...]) -> None:
    tensors, _ = arguments(5, 33, Types(dtypes[0], dtypes[0], F32))
    tensors |= {"weight": tensors["weight"].to(dtypes[1]), "bias": tensors["bias"].to(dtypes[2])}
    found = check(backend, tensors)
    assert (found["dweight"].dtype, found["dbias"].dtype) == dtypes[1:]


def strided(x: Tensor) -> Tensor:
    """The same values as rows among NaN."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    room[..., 1:-2] = x
    return room[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": strided,
    "one row for all": lambda x: x[:1].expand(x.shape),
    "columns": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
}


@each_backend
@pytest.mark.parametrize(("layout", "which"), [*itertools.product(LAYOUTS, ["z", "h", "weight", "bias", "gradient"])])
def test_layouts(backend: str, layout: str, which: str) -> None:
    tensors, _ = arguments(4, 40, FULL)
    every = {**tensors, "gradient": cotangents(tensors)[0]}
    every[which] = LAYOUTS[layout](every[which])
    grad = every.pop("gradient")
    check(backend, every, (grad,))


@each_backend
def test_a_scalar_loss(backend: str) -> None:
    """Its gradient has stride 0 in every dimension."""
    tensors = arguments(4, 33, FULL)[0]
    check(backend, tensors, (torch.ones(()).expand(4, 33),))


@each_backend
@pytest.mark.parametrize(
    "wanted", [set(each) for n in range(1, 5) for each in itertools.combinations(("z", "h", "weight", "bias"), n)]
)
def test_every_subset_of_gradients(backend: str, wanted: set[str]) -> None:
    tensors, _ = arguments(4, 11, FULL)
    grads = cotangents(tensors)
    every = three(backend, tensors, grads)[0]
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    torch.autograd.backward(function(backend=backend, **leaves), grads)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, every[f"d{name}"]), name


@needs_cpp
def test_sums_do_not_depend_on_threads() -> None:
    tensors, _ = arguments(700, 333, FULL)
    grads, threads, found = cotangents(tensors), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(functools.partial(function, backend="cpp"), tensors, grads, OUTPUTS))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:]), name


@needs_cpp
@pytest.mark.parametrize(("rows", "types"), [(3000, FULL), (5000, HALF)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_outputs_past_the_caches(rows: int, types: Types, normed: bool) -> None:
    """Check more than 32 MiB of traffic in forward and backward, where stores bypass the caches."""
    check("cpp", arguments(rows, 576, types, normed)[0])


@needs_cpp
def test_offsets_beyond_31_bits() -> None:
    """Check the last of rows that lie 2^31 elements apart, of which only two exist in memory."""
    z = torch.zeros(1, dtype=BF16).expand(4 * 8)
    base = torch.empty(0, dtype=BF16)
    storage = torch.UntypedStorage(2 * (2**31 + 32))  # untouched pages cost nothing
    z = base.set_(storage, 0, (2, 32), (2**31, 1))
    z.copy_(normal(2, 32))
    h = normal(2, 8, dtype=BF16)
    dense = z.contiguous()
    grads = cotangents({"h": h})
    run = functools.partial(function, backend="cpp")
    for name, value in results(run, {"z": z, "h": h}, grads, OUTPUTS).items():
        assert torch.equal(value, results(run, {"z": dense, "h": h}, grads, OUTPUTS)[name]), name


Z, H, W = torch.ones(2, 12), torch.ones(2, 3), torch.ones(4, 3)
forward, backward = "depth_gru_gates_forward", "depth_gru_gates_backward"
WRONG: list[tuple[str, str, tuple[Any, ...], str]] = [
    ("width of z", forward, (H, H, None, None, 1e-6), "z must have"),
    ("rows of z", forward, (Z[:1], H, None, None, 1e-6), "z must have"),
    ("dtype of z", forward, (Z.long(), H, None, None, 1e-6), "z must be"),
    ("scalar", forward, (Z, H[0, 0], None, None, 1e-6), r"h must have shape \(\.\.\., C\)"),
    ("dtype of h", forward, (Z, H.double(), None, None, 1e-6), "h must (have|be)"),
    ("one of two", forward, (Z, H, W, None, 1e-6), "bias must"),
    ("shape of weight", forward, (Z, H, W[:3], W, 1e-6), r"weight must have shape \(4, 3\)"),
    ("shape of bias", forward, (Z, H, W, W.t(), 1e-6), r"bias must have shape \(4, 3\)"),
    ("dtype of bias", forward, (Z, H, W, W.bfloat16(), 1e-6), "bias must (have|be)"),
    ("eps", forward, (Z, H, None, None, -1.0), "eps must"),
    ("shape of dh_out", backward, (H[:1], Z, H, W, W, 1e-6, True), "dh_out must have"),
    ("dtype of dh_out", backward, (H.double(), Z, H, W, W, 1e-6, True), "dh_out"),
    ("z of backward", backward, (H, H, H, W, W, 1e-6, True), "z must have"),
]


@each_backend
@pytest.mark.parametrize(("operator", "given", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_operators_check_their_arguments(backend: str, operator: str, given: tuple[Any, ...], text: str) -> None:
    if backend == "cpp" and text == "bias must":
        text = "weight and bias must both be given"
    with pytest.raises((RuntimeError, ValueError, TypeError), match=text):
        getattr(ops, {"cpp": "", "triton": "triton_"}[backend] + operator)(*given)


@each_backend
@pytest.mark.parametrize("normed", [False, True])
def test_opcheck(backend: str, normed: bool) -> None:
    prefix = {"cpp": "", "triton": "triton_"}[backend]
    tensors = {name: tensor.requires_grad_() for name, tensor in arguments((2, 3), 5, FULL, normed)[0].items()}
    given = (tensors["z"], tensors["h"], tensors.get("weight"), tensors.get("bias"), 1e-6)
    torch.library.opcheck(getattr(ops, prefix + forward).default, given)
    given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(getattr(ops, prefix + backward).default, (normal(2, 3, 5, dtype=F32), *given, True))


@needs_cpp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normed", [False, True])
def test_compiled_calls_are_the_same(normed: bool) -> None:
    tensors, _ = arguments((2, 3), 5, FULL, normed)
    grads = cotangents(tensors)
    wanted = results(lambda **named: (dl.depth_gru_gates(**named),), tensors, grads, OUTPUTS)
    compiled = torch.compile(dl.depth_gru_gates, fullgraph=True, dynamic=True, backend="aot_eager")
    found = results(lambda **named: (compiled(**named),), tensors, grads, OUTPUTS)
    assert dl.last_backend() == "cpp"
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@each_backend
def test_reset_before_the_product_has_no_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a named backend refuses it with the reason, and that "auto" takes the reference even when strict."""
    z, h, reset_weight = normal(2, 9, dtype=F32), normal(2, 3, dtype=F32), normal(3, 3, dtype=F32)
    with dl.use_backend(backend), pytest.raises(ValueError, match=f"backend='{backend}' cannot run this call: no back"):
        dl.depth_gru_gates(z, h, reset_weight=reset_weight)
    monkeypatch.setattr("depthlstm_fast.backends.choice._strict", True)
    with dl.use_backend("auto"):
        found = dl.depth_gru_gates(z, h, reset_weight=reset_weight)
    assert dl.last_backend() == "reference"
    assert torch.equal(found, dl.reference.depth_gru_gates(z, h, reset_weight=reset_weight))
