"""layer_mix by numbers of outputs and sources, layouts, missing gradients, and calls that the public checks do not see.

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


def call(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(weights: Tensor, **sources: Tensor) -> tuple[Tensor, ...]:
        with dl.use_backend(backend):
            mixed = dl.layer_mix(list(sources.values()), weights)
        assert dl.last_backend() == backend
        return mixed

    return run


def check(backend: str, tensors: dict[str, Tensor], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = tuple(f"u{v}" for v in range(len(grads)))
    found = results(call(backend), tensors, grads, names)
    eager = results(call("reference"), tensors, grads, names)
    exact = results(call("reference"), double(tensors), tuple(grad.double() for grad in grads), names)
    assert_bound(found, eager, exact)
    return found


def make(outputs: int, sources: int, shape: tuple[int, ...], dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    tensors = {"weights": normal(outputs, sources)}
    tensors = {"weights": tensors["weights"].float()}
    return tensors | {f"x{l}": normal(*shape, dtype=dtypes[l % len(dtypes)]) for l in range(sources)}


def cotangents(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(normal(*tensors["x0"].shape, dtype=dtype) for _ in range(tensors["weights"].shape[0]))


# C++: tiles of 1024, 512, 256 and 128 features end at V = 1, 8 and 24; forward takes outputs in pairs and sources by
# four, backward outputs by four
@pytest.mark.parametrize("outputs", [1, 2, 4, 5, 8, 9, 24, 25])
@pytest.mark.parametrize("features", [33, 1025])
@needs_cpp
def test_numbers_of_outputs(outputs: int, features: int) -> None:
    tensors = make(outputs, 5, (2, features), [F32])
    check("cpp", tensors, cotangents(tensors, F32))


@pytest.mark.parametrize("outputs", [1, 2, 4, 5])
@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
def test_numbers_of_outputs_of_triton(outputs: int) -> None:
    tensors = make(outputs, 5, (2, 33), [F32])
    check("triton", tensors, cotangents(tensors, F32))


@each_backend
@pytest.mark.parametrize("sources", [2, 16, 17, 32, 33, 70, 300])
def test_numbers_of_sources(backend: str, sources: int) -> None:
    tensors = make(2, sources, (2, 9), [F32])
    check(backend, tensors, cotangents(tensors, F32))


MIXTURES = [[F32, BF16], [BF16, F16], [F16, F32, BF16], [F64, F32], [F64, BF16, F16]]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@needs_cpp
def test_mixed_dtypes(dtypes: list[torch.dtype]) -> None:
    tensors = make(3, 7, (3, 21), dtypes)
    widest = F64 if F64 in dtypes else F32
    found = check("cpp", tensors, cotangents(tensors, widest))
    assert found["u0"].dtype == widest


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
@pytest.mark.parametrize("which", ["x1", "gradient", "weights", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, which: str) -> None:
    tensors = make(2, 3, (6, 40), [F32])
    grads = list(cotangents(tensors, F32))
    change = LAYOUTS[layout]
    if which in ("gradient", "all"):
        grads[1] = change(grads[1])
    for name in tensors:
        if which in (name, "all"):
            tensors[name] = change(tensors[name])
    check(backend, tensors, tuple(grads))


@each_backend
def test_a_scalar_loss(backend: str) -> None:
    """Its gradient has stride 0 in every dimension."""
    tensors = {name: tensor.requires_grad_() for name, tensor in make(1, 3, (4, 5), [F32]).items()}
    (mixed,) = call(backend)(**tensors)
    mixed.sum().backward()
    for l in range(3):
        torch.testing.assert_close(tensors[f"x{l}"].grad, tensors["weights"][0, l].detach().expand(4, 5))


@each_backend
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_undefined_gradients_are_zeros(backend: str, used: tuple[int, ...]) -> None:
    tensors = make(3, 5, (3, 9), [F32])
    grads = cotangents(tensors, F32)
    zeroed = tuple(grad if v in used else torch.zeros_like(grad) for v, grad in enumerate(grads))
    wanted = results(call(backend), tensors, zeroed, ("u0", "u1", "u2"))
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    mixed = call(backend)(**leaves)
    torch.autograd.backward([mixed[v] for v in used], [grads[v] for v in used])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{name}"]), name


@each_backend
@pytest.mark.parametrize("wanted", [["weights"], ["x0", "x1", "x2"], ["x1"], ["weights", "x2"]])
def test_subsets_of_gradients(backend: str, wanted: list[str]) -> None:
    tensors = make(2, 3, (4, 11), [F32])
    grads = cotangents(tensors, F32)
    every = results(call(backend), tensors, grads, ("u0", "u1"))
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mixed = call(backend)(**leaves)
    assert len(kept) == (4 if "weights" in wanted else 1)  # without a gradient of the weights no source is kept
    torch.autograd.backward(mixed, grads)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, every[f"d{name}"]), name


@needs_cpp
def test_sums_do_not_depend_on_threads() -> None:
    tensors = make(2, 3, (700, 333), [F32])
    grads = cotangents(tensors, F32)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(call("cpp"), tensors, grads, ("u0", "u1")))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:]), name


@needs_cpp
def test_outputs_past_the_caches() -> None:
    """Check more than 32 MiB of traffic, where stores bypass the caches, with a last tile that is not whole."""
    tensors = make(1, 3, (2300, 1000), [F32])
    check("cpp", tensors, cotangents(tensors, F32))
    tensors = make(1, 3, (4100, 1000), [BF16])
    check("cpp", tensors, cotangents(tensors, BF16))


def test_no_output() -> None:
    assert dl.layer_mix([torch.ones(2, 3)], torch.ones(0, 1)) == ()


X, W = torch.ones(2, 3), torch.ones(1, 2)
WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("no source", lambda: ops.layer_mix_forward([], torch.ones(1, 0)), "sources must hold at least one tensor"),
    ("shapes", lambda: ops.layer_mix_forward([X, X.t()], W), "sources must have one shape"),
    ("scalar", lambda: ops.layer_mix_forward([X[0, 0]], W[:, :1]), r"sources must have shape \(\.\.\., C\)"),
    ("dtype", lambda: ops.layer_mix_forward([X.long()], W[:, :1]), r"sources\[0\] must be float32"),
    ("weights", lambda: ops.layer_mix_forward([X], W), r"weights must have shape \(V, 1\)"),
    ("one-dimensional", lambda: ops.layer_mix_forward([X, X], W[0]), r"weights must have shape \(V, 2\)"),
    (
        "shape of du",
        lambda: ops.layer_mix_backward([X.t()], [X, X], W, True, True),
        "du must have the shape of sources",
    ),
    (
        "number of du",
        lambda: ops.layer_mix_backward([], [X, X], W, True, True),
        "du must hold a tensor or None for each",
    ),
    (
        "dtype of du",
        lambda: ops.layer_mix_backward([X.double()], [X, X], W, True, True),
        "du must have the widest dtype",
    ),
]


@needs_cpp
@pytest.mark.parametrize(("wrong", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_operators_check_their_arguments(wrong: Callable[[], Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        wrong()


@each_backend
@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck(backend: str, mixed: bool) -> None:
    prefix = {"cpp": "", "triton": "triton_"}[backend]
    dtypes = [F32, BF16] if mixed else [F32]
    tensors = make(2, 3, (2, 3, 5), dtypes)
    weights, *sources = tensors.values()
    torch.library.opcheck(
        getattr(ops, f"{prefix}layer_mix_forward").default,
        ([x.clone().requires_grad_() for x in sources], weights.clone().requires_grad_()),
    )
    gradients = [normal(2, 3, 5, dtype=F32), None]
    torch.library.opcheck(
        getattr(ops, f"{prefix}layer_mix_backward").default, (gradients, sources, weights, True, True)
    )


@needs_cpp
@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_are_the_same() -> None:
    tensors = make(2, 3, (4, 5), [F32])
    grads = cotangents(tensors, F32)

    def mix(weights: Tensor, x0: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return dl.layer_mix([x0, x1, x2], weights * 1.0)

    wanted = results(mix, tensors, grads, ("u0", "u1"))
    found = results(torch.compile(mix, fullgraph=True, dynamic=True), tensors, grads, ("u0", "u1"))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
