"""Dropout on g: the kept elements, their factor, and the same mask in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BF16,
    F32,
    F64,
    MAIN_TYPES,
    NORMS,
    Types,
    arguments,
    assert_identical,
    check_gates,
    cotangents,
    fused,
    needs_cpp,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import depthlstm_fast as dl
from depthlstm_fast.reference.depth_lstm import dropout_mask

LOW = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox4x32-10 in Python integers, independently of the package.

    Source: Salmon et al., SC 2011.
    """
    x, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ k[0], second & LOW, (first >> 32) ^ x[3] ^ k[1], first & LOW]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    return x


# The authors' known-answer vectors in Random123 (kat_vectors, philox4x32 10).
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([LOW] * 4, [LOW] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_philox_of_this_file(counter: list[int], key: list[int], wanted: list[int]) -> None:
    assert philox(counter, key) == wanted


def words_by_hand(seed: int, rows: int, features: int, first: int = 0) -> np.ndarray:
    """Return the random words of ``rows`` rows from ``first`` on."""
    key = [seed & LOW, (seed >> 32) & LOW]
    words = [
        [philox([d // 4, n & LOW, n >> 32, 0], key)[d % 4] for d in range(features)] for n in range(first, first + rows)
    ]
    return np.array(words, dtype=np.uint64).reshape(rows, features)


def mask_by_hand(seed: int, rows: int, features: int, p: float, first: int = 0) -> np.ndarray:
    return words_by_hand(seed, rows, features, first) >= int(p * 2**32)


def ties(words: np.ndarray) -> list[float]:
    """Return probabilities that are, times 2^32, one of the words or beside it, and extreme ones.

    They cover each place in a group of eight features.
    """
    word = [int(words[column % len(words), column]) for column in range(8)] + [int(words.max())]
    return [
        1e-10,
        2**-32,
        1 - 2**-32,
        1 - 2**-53,
        *((w + step) / 2**32 for w in word for step in (0, 0.75, 1) if w + step < 2**32),
    ]


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 12345, -1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("features", [1, 5, 70])
def test_mask_of_the_reference(features: int, seed: int) -> None:
    mask = dropout_mask(torch.tensor([seed]), 6, features, 0.35)
    assert np.array_equal(mask.numpy(), mask_by_hand(seed, 6, features, 0.35))


def kept(
    function: Callable, shape: tuple[int, ...], features: int, p: float, seed: Tensor, dtype: torch.dtype = F32
) -> Tensor:
    """Return g * factor as the function computes it.

    i = sigmoid(0) = 1/2 and f c = 0, so c is half of the result of dropout on hidden = 1.
    """
    z = torch.zeros(*shape, 3 * features, dtype=dtype)
    c, hidden = torch.zeros(*shape, features, dtype=dtype), torch.ones(*shape, features, dtype=dtype)
    return 2 * function(z, c, hidden=hidden, norm="none", dropout_p=p, training=True, seed=seed)[1]


# within a Philox block, a vector, and the group of 64 features that the kernel draws at once, and beyond each
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("features", [1, 3, 4, 17, 63, 64, 65, 200])
@needs_cpp
def test_mask_of_the_kernel(features: int, seed: int) -> None:
    key = torch.tensor([seed])
    found = kept(fused, (7,), features, 0.35, key)
    mask = dropout_mask(key, 7, features, 0.35)
    assert torch.equal(found != 0, mask)
    torch.testing.assert_close(found[mask], torch.full_like(found[mask], 1 / 0.65))
    assert torch.equal(kept(dl.reference.depth_lstm_gates, (7,), features, 0.35, key) != 0, mask)


@pytest.mark.parametrize("p", [1e-10, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@needs_cpp
def test_probabilities(p: float, dtype: torch.dtype) -> None:
    found = kept(fused, (200,), 500, p, torch.tensor([3]), dtype)
    assert torch.equal(found != 0, dropout_mask(torch.tensor([3]), 200, 500, p))
    share = (found != 0).double().mean().item()
    assert abs(share - (1 - p)) <= 5 * (p * (1 - p) / 100_000) ** 0.5 + 1e-9  # five standard deviations
    if share:
        torch.testing.assert_close(
            found[found != 0].double().unique(), torch.tensor([1 / (1 - p)], dtype=F64), rtol=1e-2, atol=0
        )


@needs_cpp
def test_mask_counts_rows_over_all_leading_dimensions() -> None:
    seed = torch.tensor([9])
    assert torch.equal(kept(fused, (2, 3, 2), 20, 0.5, seed).view(12, 20), kept(fused, (12,), 20, 0.5, seed))


@needs_cpp
def test_seeds() -> None:
    first = kept(fused, (50,), 64, 0.5, torch.tensor([1])) != 0
    for other in (0, 2, 2**32 + 1, -1):
        second = kept(fused, (50,), 64, 0.5, torch.tensor([other])) != 0
        assert abs((first == second).double().mean().item() - 0.5) < 0.05  # 3200 coin tosses: 5.6 standard deviations
    rows = first.double()
    assert (rows[:-1] == rows[1:]).double().mean() < 0.6  # a row's mask is not the next row's either
    assert (rows[:, :-1] == rows[:, 1:]).double().mean() < 0.6


@pytest.mark.parametrize(("norm", "affine"), NORMS)
@pytest.mark.parametrize("kind", ["gelu", "tanh", "given"])
@pytest.mark.parametrize("types", MAIN_TYPES, ids=str)
@needs_cpp
def test_error_bound_with_dropout(types: Types, kind: str, norm: str, affine: bool) -> None:
    """Check outputs and gradients against the reference with the same seed: backward regenerates forward's mask."""
    tensors, options = arguments(17, 33, types, norm, affine, kind)
    check_gates(tensors, {**options, "dropout_p": 0.3, "training": True, "seed": torch.tensor([77])})


@needs_cpp
def test_backward_uses_the_mask_of_its_own_forward() -> None:
    """Check a call without a seed: forward draws one, and other draws before backward must not matter."""
    tensors, options = arguments(40, 33, MAIN_TYPES[0], kind="given")
    options.update(dropout_p=0.5, training=True)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    _, c = fused(**leaves, **options)
    torch.randn(7)
    fused(**leaves, **options)
    (dhidden,) = torch.autograd.grad(c, leaves["hidden"], torch.randn_like(c))
    without_g = fused(**{**tensors, "hidden": torch.zeros_like(tensors["hidden"])}, **options)[1]
    assert torch.equal(c == without_g, dhidden == 0)  # c = f c' exactly where g was dropped


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_torch_seed_decides(backend: str) -> None:
    tensors, options = arguments(40, 33, MAIN_TYPES[0])

    def run(number: int) -> Tensor:
        torch.manual_seed(number)
        h = dl.depth_lstm_gates(**tensors, **options, dropout_p=0.5, training=True, backend=backend)[0]
        assert dl.last_backend() == backend
        return h

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(3)
    first, second = (
        dl.depth_lstm_gates(**tensors, **options, dropout_p=0.5, training=True, backend=backend)[0] for _ in range(2)
    )
    assert not torch.equal(first, second)


@needs_cpp
def test_backends_draw_the_same_seed() -> None:
    tensors, options = arguments(40, 33, MAIN_TYPES[1])
    outputs = []
    for backend in ("reference", "cpp"):
        torch.manual_seed(3)
        outputs.append(dl.depth_lstm_gates(**tensors, **options, dropout_p=0.5, training=True, backend=backend)[0])
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("off", [{"training": False, "dropout_p": 0.5}, {"training": True, "dropout_p": 0.0}], ids=str)
def test_no_dropout(off: dict[str, Any], backend: str) -> None:
    """Check for no dropout outside training or at p = 0: a seed is ignored, and torch's generator is unchanged."""
    tensors, options = arguments(5, 9, MAIN_TYPES[0])
    state = torch.get_rng_state()
    wanted = dl.depth_lstm_gates(**tensors, **options, backend=backend)
    for seed in (None, torch.tensor([5])):
        for a, b in zip(
            dl.depth_lstm_gates(**tensors, **options, **off, seed=seed, backend=backend), wanted, strict=True
        ):
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_cpp
@pytest.mark.usefixtures("threads")
def test_mask_does_not_depend_on_threads() -> None:
    masks = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        masks.append(kept(fused, (400,), 512, 0.5, torch.tensor([3])))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@needs_cpp
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    tensors, options = arguments(40, 33, MAIN_TYPES[0])
    options.update(dropout_p=0.5, training=True)
    grads = cotangents(tensors)
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return fused(**dict(zip(names, values, strict=True)), **options)

    found = []
    for wrapped in (function, lambda *values: checkpoint(function, *values, use_reentrant=reentrant)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        torch.manual_seed(5)
        outputs = wrapped(*leaves)
        torch.autograd.backward(outputs, grads)
        found.append({"h": outputs[0].detach(), **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}})
    assert_identical(found[1], found[0])
