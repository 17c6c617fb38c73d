"""[x | h] buffers: the writes beside h, and results that do not depend on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers import needs_triton
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import depthlstm_fast as dl
from depthlstm_fast.ops import shared_buffer

D, HEADS, LENGTH, BATCH = 16, 2, 5, 3
# every ``merge`` of the decoder, and a second cell in the layer
DECODERS: dict[str, dict[str, Any]] = {
    "add": {"merge": "add"},
    "concat": {"merge": "concat"},
    "cells": {"merge": "cells"},
    "sublayer": {"merge": "add", "sublayer": True},
    "no bias": {"merge": "add", "bias": False},
}


def encoder(layers: int = 3, **options: Any) -> dl.DepthLSTMEncoder:
    torch.manual_seed(1)
    return dl.DepthLSTMEncoder(
        dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, **{"batch_first": True, **options}), layers
    )


def decoder(**options: Any) -> dl.DepthLSTMDecoder:
    torch.manual_seed(1)
    return dl.DepthLSTMDecoder(dl.DepthLSTMDecoderLayer(D, HEADS, dropout=0.0, batch_first=True, **options), 3)


@contextmanager
def counted_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Return the results of linear_into inside the block."""
    found: list[Tensor] = []
    original = shared_buffer.linear_into
    with monkeypatch.context() as patch:
        patch.setattr(shared_buffer, "linear_into", lambda *given: found.append(original(*given)) or found[-1])
        yield found


def gradients(model: torch.nn.Module, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = call()
    torch.manual_seed(7)
    output.backward(torch.randn(output.shape).to(output.dtype))
    return {
        "output": output.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def check(found: dict[str, Tensor], model: torch.nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare ``found`` with twice the error of eager fp32, against ``call(model, *inputs)`` by the reference in fp64.

    Errors are relative to the largest value of a result. Eager's error is the largest of all results, because a chain
    of cells has results whose error in eager is luckily small.
    """
    exact, doubled = copy.deepcopy(model).double(), [x.double() for x in inputs]
    with dl.use_backend("reference"):
        eager = gradients(model, lambda: call(model, *inputs))
        wanted = gradients(exact, lambda: call(exact, *doubled))
    assert found.keys() == wanted.keys()
    scales = {name: value.abs().max() for name, value in wanted.items()}
    allowed = (
        2 * max((eager[name] - wanted[name]).abs().max() / scales[name] for name in wanted)
        + 8 * torch.finfo(torch.float32).eps
    )
    for name in wanted:
        error = (found[name] - wanted[name]).abs().max() / scales[name]
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
    assert allowed < 1e-4


def test_side_by_side() -> None:
    buffer = torch.arange(40.0).view(4, 10)
    left, middle, right = buffer[:, :3], buffer[:, 3:5], buffer[:, 5:]
    (whole,) = shared_buffer.side_by_side([left, middle, right])
    assert torch.equal(whole, buffer)
    assert whole.data_ptr() == buffer.data_ptr()
    for apart in ([left, right], [right, left], [left, middle.clone()], [left[:2], middle[2:]], [left]):
        assert shared_buffer.side_by_side(apart) is apart
    # the second begins where the first ends, but a row further down, so the rows of the whole would overlap
    narrow = torch.arange(20.0)
    overlapping = [narrow.as_strided((4, 3), (4, 1)), narrow.as_strided((4, 3), (4, 1), 3)]
    assert shared_buffer.side_by_side(overlapping) is overlapping


def test_halves_share_storage_and_no_version() -> None:
    buffer, h = shared_buffer.reserve(3, 4, 5, like=torch.empty(0, dtype=torch.float64))
    left = shared_buffer.part(buffer, 0, 4)
    h.fill_(1)
    version = h._version
    left.fill_(2)
    assert h._version == version
    assert torch.equal(buffer, torch.tensor([2.0] * 4 + [1.0] * 5, dtype=torch.float64).expand(3, 9))


def test_free_columns_are_taken_once_and_by_their_width() -> None:
    buffer, h = shared_buffer.reserve(3, 4, 5, like=torch.empty(0))
    shared_buffer.mark(h, buffer)
    assert shared_buffer.take(h, 5) is None
    view = shared_buffer.pass_on(h, h.view(3, 1, 5))
    assert shared_buffer.take(h, 4) is None  # the view has them now
    assert shared_buffer.pass_on(view, view.clone()) is not view
    assert shared_buffer.take(view, 4) is buffer
    assert shared_buffer.take(view, 4) is None


@needs_triton
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"sublayer": True}, {"hidden": "ffn"}, {"bias": False}], ids=str)
def test_encoder(options: dict[str, Any], batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder(batch_first=batch_first, **options)
    source = torch.randn(BATCH, LENGTH, D)
    with dl.use_backend("triton"), counted_writes(monkeypatch) as writes:
        found = gradients(model, lambda: model(source))
    assert dl.last_backend() == "triton"
    # in all layers but the first, whose h is the input, and with sublayer=True before each second cell
    assert len(writes) == (5 if options.get("sublayer") else 2)
    check(found, model, lambda each, x: each(x), source)


@needs_triton
@pytest.mark.parametrize("feed_forward", [False, True])
@pytest.mark.parametrize("attention", [None, "add", "separate"])
def test_stacks_around_any_connection(
    attention: str | None, feed_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write beside h as often as the depth-wise LSTM's own stacks do, and the results are the same bits."""
    shape: dict[str, Any] = {"batch_first": True, "dropout": 0.0}
    source, memory = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, 4, D)
    if attention is None:
        old: torch.nn.Module = encoder(2, sublayer=feed_forward)
        new: torch.nn.Module = dl.Encoder(D, HEADS, 2, feed_forward=feed_forward, **shape)
        inputs: tuple[Tensor, ...] = (source,)
    else:
        old = dl.DepthLSTMDecoder(
            dl.DepthLSTMDecoderLayer(
                D, HEADS, merge="cells" if attention == "separate" else "add", sublayer=feed_forward, **shape
            ),
            2,
        )
        new = dl.Decoder(D, HEADS, 2, feed_forward=feed_forward, decoder_attention=attention, **shape)
        inputs = (source, memory)
    new.load_state_dict(old.state_dict(), strict=False)
    old.norm = new.connection.final_norm
    results, counts = [], []
    for stack in (old, new):
        with dl.use_backend("triton"), counted_writes(monkeypatch) as writes:
            results.append(stack(*inputs))
        assert dl.last_backend() == "triton"
        counts.append(len(writes))
    assert counts[0] == counts[1] > 0
    assert torch.equal(*results)


@needs_triton
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(**DECODERS[name])
    target, memory = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, 4, D)
    with dl.use_backend("triton"), counted_writes(monkeypatch) as writes:
        found = gradients(model, lambda: model(target, memory, tgt_is_causal=True))
    assert len(writes) == {"add": 2, "concat": 4, "cells": 5, "sublayer": 5, "no bias": 2}[name]
    check(found, model, lambda each, x, y: each(x, y, tgt_is_causal=True), target, memory)


@needs_triton
def test_passes_of_a_layer() -> None:
    """Check for one product for [x ; h'], no concatenation and no copy.

    The encoder layer's h is not the input.
    """
    model = encoder(2)
    source = torch.randn(40, 4, D)
    for grad in (False, True):
        with (
            dl.use_backend("triton"),
            torch.set_grad_enabled(grad),
            profile(activities=[ProfilerActivity.CPU]) as trace,
        ):
            model(source)
        calls = {event.key: event.count for event in trace.key_averages()}
        assert "aten::cat" not in calls
        # 2 layers: in_proj and out_proj are addmm (4), the second with a given output. z of the first layer is an mm
        # and an accumulating addmm, that of the second one mm. addmm_ and out= are counted as aten::addmm, too.
        assert (calls["aten::addmm"], calls["aten::mm"]) == (5, 2)


@needs_triton
def test_memory_kept_for_backward() -> None:
    """Check that x and h are kept as halves of one buffer, so that the product keeps the buffer only."""
    model = encoder(2)
    storages: dict[int, int] = {}
    with dl.use_backend("triton"):
        output = model(torch.randn(BATCH, LENGTH, D))
        seen, stack = set(), [output.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            stack += [edge for edge, _ in node.next_functions]
            for tensor in getattr(node, "saved_tensors", ()) or ():
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    rows = BATCH * LENGTH
    assert sum(size == rows * 2 * D * 4 for size in storages.values()) == 1


@needs_triton
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model = encoder()
    source = torch.randn(BATCH, LENGTH, D)

    def checkpointed() -> Tensor:
        h, c = source.clone().requires_grad_(), torch.zeros_like(source)
        for layer in model.layers:
            h, c = checkpoint(layer, h, c, use_reentrant=reentrant)
        return h

    with dl.use_backend("triton"):
        results = [gradients(model, checkpointed), gradients(model, lambda: model(source))]
        model.gradient_checkpointing = True
        results.append(gradients(model, lambda: model(source)))
    model.gradient_checkpointing = False
    for found in results:
        check(found, model, lambda each, x: each(x), source)


@needs_triton
def test_two_users_of_one_h() -> None:
    """Check two layers fed from one h, which would write to one place.

    The second must be refused the buffer, because the first one's x is kept for backward.
    """
    layers = encoder().layers
    source = torch.randn(BATCH, LENGTH, D)

    def run(layers: torch.nn.ModuleList, source: Tensor) -> Tensor:
        first, second, third = layers
        h, c = first(source)
        (a, _), (b, _) = second(h, c), third(h, c)
        return a + b

    with dl.use_backend("triton"):
        found = gradients(layers, lambda: run(layers, source))
    check(found, layers, run, source)


@needs_triton
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    source = torch.randn(BATCH, LENGTH, D)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=half):
            return model(source).float()

    with dl.use_backend("triton"), counted_writes(monkeypatch) as writes:
        found = gradients(model, run)
    assert len(writes) == 2
    assert all(write.dtype == half for write in writes)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    with dl.use_backend("reference"):
        exact = gradients(model, lambda: model(source))
        eager = gradients(model, run)
    for name, value in found.items():
        error, allowed = (value - exact[name]).abs().max(), (eager[name] - exact[name]).abs().max()
        assert error <= 2 * allowed + torch.finfo(half).eps * exact[name].abs().max(), name


@needs_triton
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda mode: mode.__name__)
def test_without_gradients_and_with(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder().eval()
    source = torch.randn(BATCH, LENGTH, D)
    with dl.use_backend("triton"), mode(), counted_writes(monkeypatch) as writes:
        found = model(source)
        assert len(writes) == 2
    with dl.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(found.detach(), model(source), rtol=2e-5, atol=2e-5)


@needs_triton
def test_modules_that_are_not_plain_are_called() -> None:
    model = encoder()
    source = torch.randn(BATCH, LENGTH, D)
    called = []
    model.layers[1].self_attn.out_proj.register_forward_hook(lambda *_: called.append(1))
    with dl.use_backend("triton"):
        found = gradients(model, lambda: model(source))
    assert called == [1]
    check(found, model, lambda each, x: each(x), source)
