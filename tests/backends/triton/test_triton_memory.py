"""The Triton kernels' dropout, and the memory that they read and write.

They write every element and nothing beside it. Rows may lie anywhere, also at far offsets.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BF16,
    CALLS,
    DEVICE,
    F32,
    HAS_CPP,
    Types,
    assert_identical,
    check_gates,
    cotangents,
    needs_triton,
    results,
)
from helpers import fused as fused_by
from test_dropout import LOW, SEEDS, kept, mask_by_hand, philox, ties, words_by_hand
from test_gates_layouts import expanded, expanded_once, name, strided_features, transposed
from test_ops import backward_arguments, raw
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_helpers import (  # noqa: F401, fixtures
    FULL,
    GUARD,
    HALF,
    MEMORIES,
    MIXED,
    SENTINEL,
    Memory,
    among_nan,
    check,
    dropout,
    factors_kernel,
    fused,
    gates,
    given,
    launcher,
    lazy_memory,
    memory,
    on_device,
    real_memory,
    small_wide,
)

import depthlstm_fast as dl
from depthlstm_fast.reference.depth_lstm import dropout_mask

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]  # numpy's overflows


# --- dropout


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_mask(seed: int, scheme: str, request: pytest.FixtureRequest) -> None:
    """Compare the dropped elements, forward and backward, with the paper's Philox.

    The other backends drop the same elements.
    """
    features = 37 if scheme == "wide" else 21
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    key = torch.tensor([seed], device=DEVICE)
    wanted = torch.from_numpy(mask_by_hand(seed, 5, features, 0.35)).to(DEVICE)
    tensors, options = given(5, features, FULL, "none", False, "given")
    tensors["hidden"] = torch.ones_like(tensors["hidden"])
    found = results(fused, tensors, cotangents(tensors), **options, **dropout(seed, 0.35))
    assert torch.equal(found["dhidden"] != 0, wanted)
    others = [dl.reference.depth_lstm_gates, *([functools.partial(fused_by, backend="cpp")] if HAS_CPP else [])]
    for function in others:
        assert torch.equal(kept(function, (5,), features, 0.35, key.cpu()) != 0, wanted.cpu())
    on_device = functools.partial(by_device, fused)
    factors = kept(on_device, (5,), features, 0.35, key)
    assert torch.equal(factors != 0, wanted)
    torch.testing.assert_close(factors[wanted], torch.full_like(factors[wanted], 1 / 0.65))


def by_device(function: Callable, *positional: Tensor, hidden: Tensor, **named: Any) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in function(*(x.to(DEVICE) for x in positional), hidden=hidden.to(DEVICE), **named))


def test_dropout_mask_of_real_blocks() -> None:
    """Check the wide scheme with its real blocks, beyond the first of 512 and 1024 features."""
    tensors, options = given(1, 2049, FULL, "gate", False, "given")
    tensors["hidden"] = torch.ones_like(tensors["hidden"])
    found = results(fused, tensors, cotangents(tensors), **options, **dropout(5, 0.5))
    assert torch.equal(found["dhidden"] != 0, dropout_mask(torch.tensor([5], device=DEVICE), 1, 2049, 0.5))


@pytest.mark.parametrize("row", [0, 2**31 - 2, 2**32 - 2, 2**40 + 5])
@pytest.mark.parametrize("first", [0, 512])
@pytest.mark.parametrize("seed", [5, -1])
def test_dropout_of_far_rows(seed: int, first: int, row: int) -> None:
    """Check the formula itself for rows beyond 2^32, whose elements fit no test."""
    found = torch.empty(4, 32, device=DEVICE)
    plan = launcher.Launch(1, {"ROWS": 4, "BLOCK": 32})
    key = torch.tensor([seed], device=DEVICE)
    launcher.launch(factors_kernel, (1,), (key, found, row, first, int(0.35 * 2**32), 3.0), {}, plan, False)
    words = [
        [
            philox([d // 4, n & LOW, n >> 32, 0], [seed & LOW, (seed >> 32) & LOW])[d % 4]
            for d in range(first, first + 32)
        ]
        for n in range(row, row + 4)
    ]
    assert found.tolist() == [[3.0 * (word >= int(0.35 * 2**32)) for word in line] for line in words]


@pytest.mark.parametrize("p", [1e-10, 0.5, 0.999999])
def test_dropout_probabilities(p: float) -> None:
    key = torch.tensor([3], device=DEVICE)
    found = kept(functools.partial(by_device, fused), (20,), 250, p, key)
    assert torch.equal(found != 0, dropout_mask(key, 20, 250, p))
    torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / (1 - p)))


def test_dropout_at_a_word() -> None:
    """Check that p 2^32 is truncated, and that an element whose word is that number is kept.

    1 / (1 - p) is that of p, not of the nearest fp32.
    """
    words = words_by_hand(5, 4, 32)
    found = torch.empty(4, 32, device=DEVICE)
    plan, key = launcher.Launch(1, {"ROWS": 4, "BLOCK": 32}), torch.tensor([5], device=DEVICE)
    for p in ties(words):
        threshold, scale = gates._dropout(key, p)
        assert scale == 1 / (1 - p)
        launcher.launch(factors_kernel, (1,), (key, found, 0, 0, threshold, 3.0), {}, plan, False)
        assert torch.equal(found != 0, torch.from_numpy(words >= int(p * 2**32)).to(DEVICE)), p


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_dropout_at_a_word_of_a_call(scheme: str, request: pytest.FixtureRequest) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 20, FULL, "none", False, "given")
    tensors["hidden"], tensors["c"] = torch.ones_like(tensors["hidden"]), torch.zeros_like(tensors["c"])
    grads = (torch.zeros_like(tensors["c"]), torch.ones_like(tensors["c"]))
    words = words_by_hand(5, 3, 20)
    # of the largest word: kept elements are multiplied by some 60, and a p in fp32 would give three digits of it
    for p in ties(words)[-3:]:
        found = results(fused, tensors, grads, **options, **dropout(5, p))
        mask = torch.from_numpy(words >= int(p * 2**32)).to(DEVICE)
        assert torch.equal(found["c_out"] != 0, mask), p
        assert torch.equal(found["dhidden"] != 0, mask), p
        exact = (dl.reference.depth_lstm_gates(**tensors, **options)[1].double() / (1 - p))[mask]
        torch.testing.assert_close(found["c_out"].double()[mask], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_error_bound_with_dropout(
    scheme: str, norm: str, affine: bool, kind: str, request: pytest.FixtureRequest
) -> None:
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(2, 20, FULL, norm, affine, kind)
    check(tensors, {**options, **dropout()})


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """Check that the recomputation draws the seed of forward again."""
    tensors, options = given(5, 9, FULL)
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
        found.append({"h": outputs[0].detach(), **{key: leaf.grad for key, leaf in zip(names, leaves, strict=True)}})
    assert_identical(found[1], found[0])


# --- memory


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
@pytest.mark.parametrize(("norm", "affine", "kind"), CALLS)
def test_every_element_is_written(
    norm: str,
    affine: bool,
    kind: str,
    scheme: str,
    memory: Memory,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    """Check that every element of the outputs, partial sums and statistics is written."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    inputs = on_device(raw((5,), 20, FULL, norm, affine, kind, True, True))
    found = (*gates.gates_forward(*inputs), *gates.gates_backward(*on_device(backward_arguments(inputs))))
    storages = {buffer.untyped_storage().data_ptr() for buffer, _ in memory.buffers}
    assert {x.untyped_storage().data_ptr() for x in found} < storages  # there is scratch beside the results
    for buffer, size in memory.buffers:
        inner = buffer[GUARD : GUARD + size]
        if size == 5 * gates.STATISTICS.value and kind == "given":
            inner = inner.view(5, -1)[:, : 5 * 3]  # three gates leave a quarter of the statistics' room
        assert not inner.isnan().any(), size


def test_h_may_be_written_beside_something_else() -> None:
    """Check that h goes into every row of a wider matrix, and that nothing else of it changes."""
    inputs = on_device(raw((9,), 33, FULL, "gate", True, "gelu", False, False))
    wanted, _ = gates.gates_forward(*inputs)
    for left, right in ((0, 0), (0, 7), (7, 0), (31, 64)):
        room = torch.full((9, left + 33 + right), SENTINEL, device=DEVICE)
        h, _ = gates.gates_forward(*inputs, room[:, left : left + 33])
        assert torch.equal(h, wanted)
        assert torch.equal(room[:, left : left + 33], wanted)
        assert (room[:, :left] == SENTINEL).all()
        assert (room[:, left + 33 :] == SENTINEL).all()


def rows_apart(x: Tensor) -> Tensor:
    return among_nan(x, 5)


LAYOUTS = [rows_apart, transposed, strided_features, expanded, expanded_once]


# Inputs and gradients of different layouts on a batch of (2, 3, 2) rows, where a single row stride may not exist. Each
# layout meets each in one of the two roles.
@pytest.mark.parametrize("shift", range(len(LAYOUTS)))
@pytest.mark.parametrize("inputs", LAYOUTS, ids=name)
def test_layouts(inputs: Callable, shift: int) -> None:
    gradients = LAYOUTS[(LAYOUTS.index(inputs) + shift) % len(LAYOUTS)]
    tensors, options = given((2, 3, 2), 5, MEMORIES[shift], kind="given")
    dh, dc = (gradients(gradient) for gradient in cotangents(tensors))
    check_gates({key: inputs(tensor) for key, tensor in tensors.items()}, options, (dh, dc), backend="triton")


@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_each_argument_has_its_own_row_stride(scheme: str, request: pytest.FixtureRequest) -> None:
    """Check that no stride stands in for another, and that the parameters are no views of rows."""
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 20, FULL, kind="given")
    dh, dc = cotangents(tensors)
    apart = {key: among_nan(tensor, number) for number, (key, tensor) in enumerate(tensors.items(), 3)}
    check_gates(apart, options, (among_nan(dh, 11), among_nan(dc, 13)), backend="triton")


def test_row_strides_of_the_longest_rows() -> None:
    """Check the rows for which forward loads c last."""
    tensors, options = given(2, 4100, MIXED, kind="given")
    apart = {key: among_nan(tensor, number) for number, (key, tensor) in enumerate(tensors.items(), 3)}
    for found, wanted in zip(fused(**apart, **options), fused(**tensors, **options), strict=True):
        assert torch.equal(found, wanted)


def test_row_strides() -> None:
    """Check that the launcher's stride reads the tensor's own rows, and that it finds none only if there is none."""
    whole = torch.arange(2 * 3 * 4 * 30).view(2, 3, 4, 30)
    views = [
        whole,
        whole.transpose(0, 1),
        whole.transpose(1, 2),
        whole[..., 2:7],
        whole[1:, ::2],
        whole[..., :1],
        whole[..., ::2],
    ]
    views += [whole[:, :1], whole[:, :, :1], whole[0, 0, 0], whole[:1, :1, :1]]
    views += [whole[:, :1].expand(2, 3, 4, 30), whole[:1, :1, :1].expand(2, 3, 4, 30)]
    found = 0
    for x in views:
        stride = launcher.row_stride(x)
        rows = x.reshape(-1, x.shape[-1])
        steps = {b - a for a, b in itertools.pairwise(rows[:, 0].tolist())}
        dense = x.shape[-1] == 1 or x.stride(-1) == 1
        assert (stride is not None) == (dense and len(steps) <= 1)
        if stride is not None:
            found += 1
            assert torch.equal(x.as_strided(rows.shape, (stride, 1)), rows)
    assert found >= 6


def test_alignment() -> None:
    """Check that aligned means that every row of every tensor begins at a multiple of 16 bytes."""
    for dtype, offset, stride in itertools.product((F32, BF16), range(9), range(1, 18)):
        room = torch.empty(200, dtype=dtype)
        x = room[(-room.data_ptr() // room.itemsize) % 16 + offset :]
        wanted = all(x[row * stride :].data_ptr() % 16 == 0 for row in range(4))
        assert launcher.is_aligned((None, x), (1, stride)) == wanted
        assert launcher.is_aligned((room[:0], x), (16, stride)) == (wanted and room.data_ptr() % 16 == 0)


def one_element_later(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 16, dtype=x.dtype, device=DEVICE)[1 : 1 + x.numel()].view(x.shape).copy_(x)


def rows_one_element_apart(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], x.shape[1] + 1, dtype=x.dtype, device=DEVICE)[:, :-1].copy_(x)


@pytest.mark.parametrize("move", [one_element_later, rows_one_element_apart], ids=name)
@pytest.mark.parametrize("types", [HALF, MIXED], ids=str)
@pytest.mark.usefixtures("real_memory")
def test_alignment_is_asked_of_every_operand(types: Types, move: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the promise to the compiler with one of the operands moved, and with none."""
    promised: list[bool] = []
    monkeypatch.setattr(gates, "launch", lambda *call: promised.append(call[-1]))
    tensors, _ = given(3, 32, types, kind="given")
    dh, dc = cotangents(tensors)
    whole = {**tensors, "z_bias": tensors["z"][0].to(types.affine), "dh": dh, "dc": dc, "h": dh.clone()}

    def promises(operands: dict[str, Tensor]) -> tuple[set[bool], set[bool]]:
        z, z_bias, hidden, c, weight, bias, dh, dc, h = (
            operands[key] for key in ("z", "z_bias", "hidden", "c", "weight", "bias", "dh", "dc", "h")
        )
        both = []
        for call in (
            lambda *inputs: gates.gates_forward(*inputs, h),
            lambda *inputs: gates.gates_backward(dh, dc, *inputs, True, True),
        ):
            promised.clear()
            call(z, z_bias, hidden, c, weight, bias, None, 0, 0, 1e-6, 0.0)
            both.append(set(promised))
        return both[0], both[1]

    assert promises(whole) == ({True}, {True})
    for key, x in whole.items():
        if move is one_element_later or key not in ("z_bias", "weight", "bias"):
            assert promises({**whole, key: move(x)}) == ({key in ("dh", "dc")}, {key == "h"}), key


@pytest.mark.parametrize(("types", "features"), [(HALF, 12), (MIXED, 4), (MIXED, 12), (FULL, 6)], ids=str)
def test_alignment_is_asked_of_what_is_written(types: Types, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check inputs whose every row is aligned, beside gradients whose consecutive rows are not."""
    promised: list[bool] = []
    monkeypatch.setattr(gates, "launch", lambda *call: promised.append(call[-1]))
    tensors, _ = given(3, features, types, affine=False)
    z, c, dh, dc = (
        torch.empty(3, 64, dtype=x.dtype, device=DEVICE)[:, : x.shape[1]].copy_(x)
        for x in (*tensors.values(), *cotangents(tensors))
    )
    inputs = (z, None, None, c, None, None, None, 0, 0, 1e-6, 0.0)
    gates.gates_forward(*inputs)
    gates.gates_backward(dh, dc, *inputs, False, False)
    assert set(promised) == {False}


@pytest.mark.parametrize("kind", ["gelu", "given"])
@pytest.mark.parametrize("scheme", ["narrow", "wide"])
def test_rows_more_than_2_to_the_31_elements_apart(scheme: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Check three rows at offsets 0, 2^30 and 2^31.

    An int32 would wrap to -2^31, where zeros are read in place of the last row.
    """
    if scheme == "wide":
        request.getfixturevalue("small_wide")
    tensors, options = given(3, 20, HALF, kind=kind)
    dh, dc = cotangents(tensors)
    by_row = {key: x for key, x in {**tensors, "dh": dh, "dc": dc}.items() if key not in ("weight", "bias")}
    room = lazy_memory(2**31 + 2**31 + 4096, BF16)
    far = {}
    for number, (key, x) in enumerate(by_row.items()):
        far[key] = room.as_strided(x.shape, (2**30, 1), 2**31 + 512 * number)
        far[key].copy_(x)
    check_gates(
        {**tensors, **{key: far[key] for key in tensors if key in far}},
        options,
        (far["dh"], far["dc"]),
        backend="triton",
    )


@pytest.mark.parametrize("features", [64, 4096] if DEVICE == "cuda" else [64])
@pytest.mark.usefixtures("real_memory")
def test_more_than_2_to_the_31_elements(features: int) -> None:
    """Check calls with more than 2^31 elements on a GPU, and with few elements in the interpreter.

    test_triton_interpreter.py runs the last programs of as many elements.
    """
    elements = 2**31 if DEVICE == "cuda" else 4 * features * 5
    rows = elements // (4 * features) + 3
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < rows * features * 2 * 20:
        pytest.skip(f"needs {rows * features * 40 / 2**30:.0f} GiB of the GPU's memory")
    # the first and last rows, and those about 2^29, 2^30 and 2^31 elements, are random; the others are zeros
    marks = [0, *(elements // divisor // (4 * features) for divisor in (4, 2, 1)), rows - 2]
    chosen = torch.tensor(sorted({row for mark in marks for row in range(max(mark - 1, 0), min(mark + 2, rows))}))
    tensors, options = given(len(chosen), features, HALF, affine=False)
    grads = cotangents(tensors)

    def scattered(x: Tensor) -> Tensor:
        whole = torch.zeros(rows, x.shape[1], dtype=x.dtype, device=DEVICE)
        whole[chosen] = x
        return whole

    found = results(
        fused, {key: scattered(x) for key, x in tensors.items()}, (scattered(grads[0]), scattered(grads[1])), **options
    )
    assert_identical({key: value[chosen] for key, value in found.items()}, results(fused, tensors, grads, **options))
