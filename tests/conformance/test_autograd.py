"""Every op on every backend in autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import F32, Types, assert_identical, normal
from suite import FULL, MIXED, Op, Path, Variant, cases, dropout, fused, make, run

import depthlstm_fast as dl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's overflows


@cases("variant, types", lambda op, path: itertools.product(op.variants[:2], path.among(FULL, MIXED)))
def test_nothing_given_is_written(op: Op, path: Path, variant: Variant, types: Types) -> None:
    tensors, options = make(op, path, *path.sizes, types, variant)
    options.update(dropout(op, path))
    grads = op.cotangents(tensors)
    given = {**tensors, **{f"gradient {number}": grad for number, grad in enumerate(grads)}}
    given |= {name: option for name, option in options.items() if isinstance(option, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in given.items()}
    versions = {name: tensor._version for name, tensor in given.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(op, path, **leaves, **options)
    kept = [output.detach().clone() for output in outputs]
    torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert {name: tensor._version for name, tensor in given.items()} == versions
    assert_identical({name: tensor.detach() for name, tensor in given.items()}, before)
    assert_identical(
        dict(zip(op.outputs, [output.detach() for output in outputs], strict=True)),
        dict(zip(op.outputs, kept, strict=True)),
    )
    for output in outputs:
        for name, tensor in given.items():
            assert output.data_ptr() != tensor.data_ptr(), name


@cases("variant", lambda op, path: op.variants)
def test_backward_twice_gives_twice_the_gradient(op: Op, path: Path, variant: Variant) -> None:
    tensors, options = make(op, path, *path.sizes, FULL, variant)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(op, path, **leaves, **options)
    grads = op.cotangents(tensors)
    torch.autograd.backward(outputs, grads, retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in leaves.items()}
    torch.autograd.backward(outputs, grads)
    assert_identical(
        {name: tensor.grad for name, tensor in leaves.items()}, {name: 2 * gradient for name, gradient in once.items()}
    )


def subsets(op: Op, path: Path) -> list[str]:
    names = ["z", "c", "weight", "bias", "hidden"]
    return ["-".join(subset) for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


@cases("wanted", subsets, one_path=True, only="depth_lstm")
def test_every_subset_of_gradients(op: Op, path: Path, wanted: str) -> None:
    names = wanted.split("-")
    tensors, options = make(op, path, *path.sizes, FULL, ("gate", True, "given" if "hidden" in names else "gelu"))
    grads = op.cotangents(tensors)
    every = run(op, path, tensors, grads, **options)
    leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}
    outputs = fused(op, path, **leaves, **options)
    assert all(output.requires_grad == bool(wanted) for output in outputs)
    if wanted:
        torch.autograd.backward(outputs, grads)
    for name, leaf in leaves.items():
        if name in names:
            assert torch.equal(leaf.grad, every[f"d{name}"]), name
        else:
            assert leaf.grad is None, name


MOST_TENSORS = 9  # of which every subset is taken; of more, and interpreted or simulated, each alone and all


@cases("variant", lambda op, path: op.variants if path.native else op.variants[:2], one_path=True)
def test_what_needs_a_gradient_is_what_does_in_pytorch(op: Op, path: Path, variant: Variant) -> None:
    """Whichever tensors are trained: an output that depends on none of them needs no gradient."""
    tensors, options = make(op, path, *path.sizes, FULL, variant)
    names, grads = list(tensors), op.cotangents(tensors)
    every = run(op, path, tensors, grads, **options)
    every_size = path.native and len(names) <= MOST_TENSORS
    sizes = range(len(names) + 1) if every_size else (1, len(names))
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes):
        leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        outputs = fused(op, path, **leaves, **options)
        plain = op.reference(**leaves, **options)
        assert [each.requires_grad for each in outputs] == [each.requires_grad for each in plain], wanted
        used = [index for index, output in enumerate(outputs) if output.requires_grad]
        torch.autograd.backward([outputs[index] for index in used], [grads[index] for index in used])
        for name, leaf in leaves.items():
            if name not in wanted:
                assert leaf.grad is None, (wanted, name)
                continue
            assert leaf.grad is not None, (wanted, name)
            torch.testing.assert_close(leaf.grad, every[f"d{name}"], rtol=1e-5, atol=1e-5)


def undefined(op: Op, path: Path) -> Any:
    return itertools.product(["h", "c"], op.variants, [FULL, *path.main[1:2], MIXED] if path.native else [FULL])


@cases("used, variant, types", undefined, only="depth_lstm")
def test_undefined_gradients_are_zeros(op: Op, path: Path, used: str, variant: Variant, types: Types) -> None:
    tensors, options = make(op, path, *path.sizes, types, variant)
    dh, dc = op.cotangents(tensors)
    dh, dc = (dh, torch.zeros_like(dc)) if used == "h" else (torch.zeros_like(dh), dc)
    wanted = run(op, path, tensors, (dh, dc), **options)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    h, c = fused(op, path, **leaves, **options)
    torch.autograd.backward([h] if used == "h" else [c], [dh] if used == "h" else [dc])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted[f"d{name}"]), name


@cases(one_path=True)
def test_neither_gradient(op: Op, path: Path) -> None:
    """Check an output that is in the graph but gets no gradient."""
    tensors, options = make(op, path, 5, 17, FULL, op.variants[0])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused(op, path, **leaves, **options)
    extra = normal(3).requires_grad_()
    gradients = torch.autograd.grad((extra * 2).sum(), [extra, *outputs, *leaves.values()], allow_unused=True)
    assert gradients[1:] == (None,) * (len(leaves) + len(outputs))


@cases(one_path=True)
def test_no_graph_without_gradients(op: Op, path: Path) -> None:
    tensors, options = make(op, path, 5, 17, FULL, op.variants[0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not fused(op, path, **tensors, **options)[0].requires_grad
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with torch.no_grad():
        assert not fused(op, path, **leaves, **options)[0].requires_grad


@cases("variant", lambda op, path: op.variants[:2], one_path=True)
def test_kept_for_backward(op: Op, path: Path, variant: Variant) -> None:
    """Check that only arguments are kept, and outputs where the op says so: no copy and nothing else derived."""
    tensors, options = make(op, path, 5, 17, FULL, variant)
    options.update(dropout(op, path))
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = fused(op, path, **{name: tensor.requires_grad_() for name, tensor in tensors.items()}, **options)
    names = tensors.keys() - op.unkept if op.kept is None else op.kept(tensors)
    known = {**tensors, **dict(zip(op.outputs, outputs, strict=True))}
    wanted = [known[name] for name in names]
    seed = [options["seed"]] if op.has_dropout else []
    given = {tensor.data_ptr() for tensor in (*wanted, *seed)}
    assert {tensor.data_ptr() for tensor in kept} == given


@cases(one_path=True, only="depth_lstm")
def test_saved_tensors_must_not_change(op: Op, path: Path) -> None:
    tensors, options = make(op, path, 5, 17, FULL, op.variants[0])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    z = leaves["z"] * 1
    h, _ = fused(op, path, **{**leaves, "z": z}, **options)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.backward(normal(*h.shape, dtype=F32).to(h.device))


@cases("variant", lambda op, path: op.variants[:2], one_path=True)
def test_double_backward_is_refused_with_a_hint(op: Op, path: Path, variant: Variant) -> None:
    tensors, options = make(op, path, 5, 8, FULL, variant)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    outputs = fused(op, path, **tensors, **options)
    gradients = torch.autograd.grad(outputs, leaves, op.cotangents(tensors), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r'no second derivative; use backend="reference"'):
            torch.autograd.grad(gradient, leaves, torch.randn_like(gradient), retain_graph=True, allow_unused=True)
    outputs = op.function(**tensors, **options, backend="reference")  # the hint's advice works
    gradients = torch.autograd.grad(outputs, leaves, op.cotangents(tensors), create_graph=True)
    # of all gradients: where an op is linear in each tensor, a tensor's own gradient does not depend on it
    total = sum(gradient.double().square().sum() for gradient in gradients)
    assert torch.autograd.grad(total, leaves[0])[0].any()
    assert dl.last_backend() == "reference"


@cases(one_path=True)
def test_gradients_may_be_kept_in_the_graph(op: Op, path: Path) -> None:
    """Check that create_graph=True alone, as some optimisers and hooks use it, changes no gradient."""
    tensors, options = make(op, path, 5, 8, FULL, op.variants[0])
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    grads = op.cotangents(tensors)
    plain = torch.autograd.grad(fused(op, path, **tensors, **options), leaves, grads)
    kept = torch.autograd.grad(fused(op, path, **tensors, **options), leaves, grads, create_graph=True)
    for a, e in zip(kept, plain, strict=True):
        assert torch.equal(a, e)
