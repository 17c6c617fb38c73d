"""layer_attend by numbers of sources, layouts, missing gradients, and calls that the public checks do not see.

tests/conformance has values, dtypes, sizes and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, HAS_CPP, HAS_TRITON, assert_bound, double, needs_cpp, normal, results
from torch import Tensor

import depthlstm_fast as dl

BACKENDS = [name for name, has in (("cpp", HAS_CPP), ("triton", HAS_TRITON)) if has]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ops = torch.ops.depthlstm_fast
PARAMETERS = ("query", "key_weight", "weight", "bias")


def call(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(**named: Any) -> tuple[Tensor, ...]:
        sources = [value for name, value in named.items() if name.startswith("x")]
        others = {name: value for name, value in named.items() if not name.startswith("x")}
        with dl.use_backend(backend):
            u = dl.layer_attend(sources, **others)
        assert dl.last_backend() == backend
        return (u,)

    return run


def check(backend: str, tensors: dict[str, Tensor], grad: Tensor, **options: Any) -> dict[str, Tensor]:
    found = results(call(backend), tensors, (grad,), ("u",), **options)
    eager = results(call("reference"), tensors, (grad,), ("u",), **options)
    exact = results(call("reference"), double(tensors), (grad.double(),), ("u",), **options)
    assert_bound(found, eager, exact)
    return found


def make(sources: int, shape: tuple[int, ...], dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    features = shape[-1]
    tensors = {f"x{l}": normal(*shape, dtype=dtypes[l % len(dtypes)]) for l in range(sources)}
    tensors["query"] = normal(features, scale=features**-0.5, dtype=F32)
    tensors |= {name: normal(features, scale=0.3, shift=1.0, dtype=F32) for name in PARAMETERS[1:3]}
    return {**tensors, "bias": normal(features, dtype=F32)}


# C++: by four and by two; Triton: 32 pointers a launch
@each_backend
@pytest.mark.parametrize("sources", [2, 3, 16, 17, 32, 33, 70, 300])
def test_numbers_of_sources(backend: str, sources: int) -> None:
    tensors = make(sources, (2, 19), [F32])
    check(backend, tensors, normal(2, 19, dtype=F32))


# C++ computes rows of fewer than 4 features in double
@pytest.mark.parametrize("features", [2, 3, 4, 17])
@pytest.mark.parametrize("dtypes", [[F32, BF16], [BF16, F16], [F16, F32, BF16], [F64, F32], [F64, BF16, F16]], ids=str)
@needs_cpp
def test_mixed_dtypes(dtypes: list[torch.dtype], features: int) -> None:
    tensors = make(7, (3, features), dtypes)
    widest = F64 if F64 in dtypes else F32
    assert check("cpp", tensors, normal(3, features, dtype=widest))["u"].dtype == widest


def strided(x: Tensor) -> Tensor:
    """The same values as rows among NaN."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    room[..., 1:-2] = x
    return room[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": strided,
    "one row for all": lambda x: x[:1].expand(x.shape),
    "columns": lambda x: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2],
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
}


@each_backend
@pytest.mark.parametrize("which", ["x1", "gradient", "query", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, which: str) -> None:
    tensors, grad = make(3, (6, 40), [F32]), normal(6, 40, dtype=F32)
    change = LAYOUTS[layout]
    grad = change(grad) if which in ("gradient", "all") else grad
    for name in tensors:
        if which in (name, "all"):
            tensors[name] = change(tensors[name])
    check(backend, tensors, grad)


@each_backend
def test_a_scalar_loss(backend: str) -> None:
    """Its gradient has stride 0 in every dimension."""
    tensors = make(3, (4, 20), [F32])
    weights = [tensors.pop(name) for name in ("weight", "bias")]
    assert weights
    found = check(backend, tensors, torch.ones(()).expand(4, 20))
    assert found["dx0"].any()


@each_backend
@pytest.mark.parametrize(
    "wanted",
    [["x1"], ["query"], ["key_weight"], ["weight"], ["bias"], ["x0", "x1", "x2"], ["query", "weight"]],
    ids=str,
)
def test_subsets_of_gradients(backend: str, wanted: list[str]) -> None:
    tensors, grad = make(3, (4, 21), [F32]), normal(4, 21, dtype=F32)
    every = results(call(backend), tensors, (grad,), ("u",))
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    (u,) = call(backend)(**leaves)
    u.backward(grad)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, every[f"d{name}"]), name


@each_backend
@pytest.mark.parametrize("sources", [1, 3, 7])
def test_a_zero_query_gives_the_exact_mean(backend: str, sources: int) -> None:
    xs = [normal(2, 37, dtype=F32) for _ in range(sources)]
    (u,) = call(backend)(**{f"x{l}": x for l, x in enumerate(xs)}, query=torch.zeros(37))
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    assert torch.equal(u, total / sources)


@each_backend
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_far_from_zero(backend: str, norm: str) -> None:
    """Check sources whose mean is 1e4 deviations: N takes its statistics in two passes."""
    tensors = make(3, (4, 64), [F32])
    for l in range(3):
        tensors[f"x{l}"] += 1e4
    if norm == "rms":
        del tensors["bias"]
    grad = normal(4, 64, dtype=F32)
    found = results(call(backend), tensors, (grad,), ("u",), norm=norm)
    eager = results(call("reference"), tensors, (grad,), ("u",), norm=norm)
    exact = results(call("reference"), double(tensors), (grad.double(),), ("u",), norm=norm)
    assert_bound(found, eager, exact, condition=1e4)


@each_backend
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_passed_on(backend: str, special: float) -> None:
    tensors = make(3, (3, 20), [F32])
    tensors["x1"][1, 2] = special
    (found,), (wanted,) = call(backend)(**tensors), call("reference")(**tensors)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found[1].isnan().all()


@each_backend
def test_large_scores(backend: str) -> None:
    """Check scores whose exponentials overflow, and sources of which the softmax takes one alone."""
    tensors = make(4, (5, 32), [F32])
    tensors["query"] *= 1e4
    check(backend, tensors, normal(5, 32, dtype=F32))


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_outputs_past_the_caches(dtype: torch.dtype) -> None:
    rows = 2100 if dtype == F32 else 4200
    tensors = make(3, (rows, 1024), [dtype])
    check("cpp", tensors, normal(rows, 1024, dtype=dtype))


@needs_cpp
def test_sums_do_not_depend_on_threads() -> None:
    tensors, grad = make(3, (700, 130), [F32]), normal(700, 130, dtype=F32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(call("cpp"), tensors, (grad,), ("u",)))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:]), name


X, Q = torch.ones(2, 3), torch.ones(3)
WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("none", lambda: ops.layer_attend_forward([], Q, None, None, None, 0, 1e-6), "sources must hold at least one"),
    ("query", lambda: ops.layer_attend_forward([X], X, None, None, None, 0, 1e-6), r"query must have shape \(3,\)"),
    ("key", lambda: ops.layer_attend_forward([X], Q, X[0, :2], None, None, 0, 1e-6), r"key_weight must have shape"),
    ("norm", lambda: ops.layer_attend_forward([X], Q, None, None, None, 2, 1e-6), "norm must be 0 or 1; found 2"),
    ("eps", lambda: ops.layer_attend_forward([X], Q, None, None, None, 0, -1.0), "eps must not be negative"),
    ("bias", lambda: ops.layer_attend_forward([X], Q, None, None, Q, 0, 1e-6), "weight must be given with bias"),
    ("rms", lambda: ops.layer_attend_forward([X], Q, None, Q, Q, 1, 1e-6), "bias must be None with norm rms"),
    (
        "du",
        lambda: ops.layer_attend_backward(Q, [X], Q, None, None, None, 0, 1e-6, True, True, True),
        "du must have the shape of sources",
    ),
]


@needs_cpp
@pytest.mark.parametrize(("wrong", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_operators_check_their_arguments(wrong: Callable[[], Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        wrong()


@each_backend
def test_opcheck(backend: str) -> None:
    prefix = {"cpp": "", "triton": "triton_"}[backend]
    tensors = make(3, (2, 3, 5), [F32, BF16])
    sources, parameters = list(tensors.values())[:3], list(tensors.values())[3:]
    forward = ([x.clone().requires_grad_() for x in sources], *(p.clone().requires_grad_() for p in parameters))
    torch.library.opcheck(getattr(ops, f"{prefix}layer_attend_forward").default, (*forward, 0, 1e-6))
    backward = (normal(2, 3, 5, dtype=F32), sources, *parameters, 0, 1e-6, True, True, True)
    torch.library.opcheck(getattr(ops, f"{prefix}layer_attend_backward").default, backward)


@needs_cpp
@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_are_the_same() -> None:
    tensors, grad = make(3, (4, 20), [F32]), normal(4, 20, dtype=F32)

    def attend(x0: Tensor, x1: Tensor, x2: Tensor, query: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        return (dl.layer_attend([x0, x1, x2], query * 1.0, **others),)

    wanted = results(attend, tensors, (grad,), ("u",))
    found = results(torch.compile(attend, fullgraph=True, dynamic=True), tensors, (grad,), ("u",))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
