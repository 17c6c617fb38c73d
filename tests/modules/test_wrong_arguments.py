"""Arguments of modules and tools that are refused by name, before anything is computed; and their right values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

C = 8
connections = dl.connections
Refusal = tuple[Callable[[], Any], type[Exception], str]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, C)


def decoder(**options: Any) -> dl.Decoder:
    return dl.Decoder(C, 2, 2, batch_first=True, connection="pre-norm", **options).eval()


def encoder(connection: Any) -> dl.Encoder:
    return dl.Encoder(C, 2, 2, connection=connection)


def check(refusal: Refusal) -> None:
    call, error, text = refusal
    with pytest.raises(error, match=text):
        call()


PLAIN, MERGED, CONTEXT = {}, {"decoder_attention": "merged"}, {"context": "gate"}


@pytest.mark.parametrize(("own", "wanted"), [(PLAIN, "Decoder"), (MERGED, "Merged"), (CONTEXT, "(Decoder|Multiscale)")])
@pytest.mark.parametrize("other", [PLAIN, MERGED, CONTEXT])
def test_caches_of_another_kind_of_decoder(own: dict[str, Any], wanted: str, other: dict[str, Any]) -> None:
    memory = rows(1, 3)
    made = [decoder(**each).new_caches((memory,) * 3 if "context" in each else memory) for each in (own, other)]
    given = (memory,) * 3 if "context" in own else memory
    each = decoder(**own)
    assert each(rows(2, 1), given, caches=made[0]).shape == (2, 1, C)
    if other is own:
        return
    for call in (lambda: each(rows(2, 1), given, caches=made[1]), lambda: each.step(rows(2, 1), made[1])):
        with pytest.raises(TypeError, match=f"cache must be a {wanted}Cache, as new_caches? makes it; found "):
            call()


def test_merged_caches_keep_their_rows() -> None:
    each, memory = decoder(**MERGED), rows(1, 3)
    caches = each.new_caches(memory)
    each.step(rows(2, 1), caches)
    with pytest.raises(ValueError, match="tgt must have the batch that the cache began with, 2; found 1"):
        each.step(rows(1, 1), caches)


@pytest.mark.parametrize("options", [PLAIN, MERGED])
def test_rows_of_a_reordering(options: dict[str, Any]) -> None:
    each, memory = decoder(**options), rows(1, 3)
    caches = each.new_caches(memory)
    caches[0].reorder(torch.tensor([1, 1]))  # nothing is kept yet
    each.step(rows(2, 1), caches)
    for wrong, error, text in (
        (torch.tensor([5, 6]), ValueError, r"rows must hold rows from 0 to 1; found \[5, 6\]"),
        (torch.tensor([-1, 0]), ValueError, r"rows must hold rows from 0 to 1; found \[-1, 0\]"),
        (torch.tensor([0.0, 1.0]), TypeError, "rows must be an int64 tensor; found torch.float32"),
        ([1, 1], TypeError, "rows must be an int64 tensor; found list"),
        (torch.tensor([[0, 1]]), ValueError, r"rows must have shape \(2,\); found \(1, 2\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "rows must be on the device of the cache, cpu"),
    ):
        with pytest.raises(error, match=text):
            caches[0].reorder(wrong)
    caches[0].reorder(torch.tensor([1, 1]))
    assert caches[0].rows == 2


@pytest.mark.parametrize(
    "refusal",
    [
        (lambda: decoder().step(rows(1, 1), dl.Decoder(6, 2, 2).new_caches(torch.ones(1, 3, 6))), ValueError,
         "cache must be of a decoder of 8 features; found 6"),
        (lambda: dl.DepthLSTMDecoderLayer(C, 2).step(rows(1, 1), None), TypeError,
         "cache must be a DecoderCache, as new_cache makes it; found NoneType"),
        (lambda: encoder(lambda d, n: connections.PreNorm(d, n + 3)), ValueError,
         "connection must return a Connection of d_model=8, num_branches=4; found d_model=8, num_branches=7"),
        (lambda: encoder(lambda d, n: connections.PreNorm(d, n - 1)), ValueError, "found d_model=8, num_branches=3"),
        (lambda: encoder(lambda d, n: connections.PreNorm(9, n)), ValueError, "found d_model=9, num_branches=4"),
        (lambda: encoder(functools.partial(connections.PreNorm, foo=1)), TypeError,
         r"connection must be callable with \(d_model, num_branches\); found functools.partial"),
        (lambda: encoder(dict), TypeError, "connection must be callable with"),
        (lambda: encoder(lambda: 0), TypeError, "connection must be callable with .*: too many positional arguments"),
        (lambda: dl.DepthLSTMEncoder(dl.DepthLSTMEncoderLayer(C, 2), 1, norm="layer"), TypeError,
         r"norm must be a torch\.nn\.Module or None; found str"),
        (lambda: dl.DepthLSTMDecoder(dl.DepthLSTMDecoderLayer(C, 2), 1, norm=torch.ones(2)), TypeError,
         r"norm must be a torch\.nn\.Module or None; found Tensor"),
    ],
)  # fmt: skip
def test_refusals(refusal: Refusal) -> None:
    check(refusal)


SMALL: dict[str, Any] = {
    "src_vocab": 9, "tgt_vocab": 9, "d_model": C, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1,
}  # fmt: skip
FLAGS: list[tuple[str, Callable[[Any], Any]]] = [
    ("training", lambda v: dl.depth_lstm_gates(rows(2).repeat(1, 4), rows(2), training=v)),
    ("training", lambda v: dl.reference.depth_lstm_gates(rows(2).repeat(1, 4), rows(2), training=v)),
    *((name, lambda v, name=name: dl.DepthLSTMTransformer(**SMALL, **{name: v}))
      for name in ("bias", "sublayer", "share_cell", "share_embeddings", "tie_output", "final_norm")),
    ("bias", lambda v: dl.DepthLSTMCell(C, C, bias=v)),
    ("bias", lambda v: dl.reference.SelfAttention(C, 2, bias=v)),
    ("batch_first", lambda v: dl.DepthLSTMEncoderLayer(C, 2, batch_first=v)),
    ("batch_first", lambda v: dl.Encoder(C, 2, 1, batch_first=v)),
    ("bias", lambda v: dl.Encoder(C, 2, 1, bias=v)),
    *((name, lambda v, name=name: connections.DepthGRU(C, 2, **{name: v}))
      for name in ("reset_before", "gate_norm", "bias")),
    ("share_cell", lambda v: connections.DepthLSTM(C, 2, share_cell=v)),
    ("normalize_before", lambda v: connections.DLCL(C, 2, normalize_before=v)),
    ("freeze", lambda v: dl.grow(dl.Transformer(**SMALL), 1, freeze=v)),
    ("copy", lambda v: dl.grow(dl.Transformer(**SMALL), 1, copy=v)),
    ("drop", lambda v: dl.linearise(dl.Encoder(C, 2, 1), [(rows(90, 2),)], 0, drop=v)),
    ("enabled", lambda v: dl.keep_memory(v)),
    ("enabled", lambda v: dl.fold_output_projections(dl.DepthLSTMEncoderLayer(C, 2), v)),
    ("use_cache", lambda v: dl.Transformer(**SMALL).generate(IDS, 2, use_cache=v)),
    ("return_scores", lambda v: dl.Transformer(**SMALL).generate(IDS, 2, return_scores=v)),
    ("return_hidden", lambda v: dl.Transformer(**SMALL)(IDS, IDS, return_hidden=v)),
    ("is_causal", lambda v: dl.DepthLSTMEncoderLayer(C, 2)(rows(3, 2), is_causal=v)),
    ("tgt_is_causal", lambda v: dl.DepthLSTMDecoderLayer(C, 2)(rows(3, 2), rows(3, 2), tgt_is_causal=v)),
    ("memory_is_causal", lambda v: dl.DepthLSTMDecoderLayer(C, 2)(rows(3, 2), rows(3, 2), memory_is_causal=v)),
]  # fmt: skip
IDS = torch.randint(3, 9, (2, 4))


@pytest.mark.parametrize(("name", "call"), FLAGS)
@pytest.mark.parametrize("value", ["False", None, float("nan"), torch.ones(2), 0], ids=lambda v: type(v).__name__)
def test_switches_are_true_or_false(name: str, call: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a bool; found {type(value).__name__}"):
        call(value)


@pytest.mark.parametrize("value", ["False", 0, torch.ones(2)], ids=lambda v: type(v).__name__)
def test_switches_that_may_be_none(value: Any) -> None:
    with pytest.raises(TypeError, match="feed_forward must be a bool"):
        dl.Encoder(C, 2, 1, feed_forward=value)
    with pytest.raises(TypeError, match="is_causal must be a bool"):
        dl.Encoder(C, 2, 1)(rows(3, 2), is_causal=value)
    with pytest.raises(TypeError, match="tgt_is_causal must be a bool"):
        dl.DepthLSTMDecoder(dl.DepthLSTMDecoderLayer(C, 2), 1)(rows(3, 2), rows(3, 2), tgt_is_causal=value)
    assert dl.Encoder(C, 2, 1)(rows(3, 2), is_causal=None).shape == (3, 2, C)


FOREIGN = [("float64", TypeError), ("bfloat16", TypeError), ("meta", ValueError)]


@pytest.mark.parametrize(("kind", "error"), FOREIGN)
@pytest.mark.parametrize("module", [dl, dl.reference], ids=["fused", "reference"])
def test_input_of_another_dtype_or_device_in_layers(kind: str, error: type[Exception], module: Any) -> None:
    x, memory = rows(2, 4), rows(2, 3)
    other, other_memory = foreign(x, kind), foreign(memory, kind)
    layer, below = module.DepthLSTMEncoderLayer(C, 2), module.DepthLSTMDecoderLayer(C, 2)
    stack = module.DepthLSTMDecoder(below, 2)
    for name, call in (
        ("src", lambda: layer(other)),
        ("src", lambda: module.DepthLSTMEncoder(layer, 2)(other)),
        ("tgt", lambda: below(other, x)),
        ("memory", lambda: below(x, other)),
        ("memory", lambda: stack(x, other)),
        ("memory", lambda: below.new_cache(other_memory)),
        ("memory", lambda: stack.new_caches(other_memory)),
    ):
        with pytest.raises(error, match=rf"{name} must be (float32 beside a float32 weight|on the device of weight)"):
            call()


@pytest.mark.parametrize(("kind", "error"), FOREIGN)
@pytest.mark.parametrize("connection", ["pre-norm", "dlcl", "depth-lstm"])
def test_input_of_another_dtype_or_device_in_stacks(kind: str, error: type[Exception], connection: str) -> None:
    x, memory = rows(2, 4), rows(2, 3)
    other, other_memory = foreign(x, kind), foreign(memory, kind)
    options = {"batch_first": True, "connection": connection}
    below = dl.Decoder(C, 2, 2, **options)
    merged = dl.Decoder(C, 2, 2, **options, decoder_attention="merged")
    for name, call in (
        ("src", lambda: dl.Encoder(C, 2, 2, **options)(other)),
        ("tgt", lambda: below(other, memory)),
        ("tgt", lambda: merged(other, memory)),
        ("memory", lambda: below(x, other_memory)),
        ("memory", lambda: below.new_caches(other_memory)),
    ):
        with pytest.raises(error, match=rf"{name} must be (float32 beside a float32 weight|on the device of weight)"):
            call()


def foreign(x: torch.Tensor, kind: str) -> torch.Tensor:
    return x.to("meta") if kind == "meta" else x.to(getattr(torch, kind))


def test_what_may_bring_an_input_to_the_weights() -> None:
    """Check that a hook, and autocast, still do."""
    layer = dl.DepthLSTMEncoderLayer(C, 2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(rows(3, 2).bfloat16())
    cast = layer.self_attn.register_forward_pre_hook(lambda _, given: tuple(each.float() for each in given[:1]))
    with pytest.raises(TypeError, match=r"^(c|h|x) must be"):
        layer(rows(3, 2).double())  # the attention takes it, and the cell's own state does not fit
    cast.remove()
    with pytest.raises(TypeError, match="src must be float32 beside a float32 weight; found float64"):
        layer(rows(3, 2).double())


def test_ids_that_are_no_dense_tensor() -> None:
    model = dl.Transformer(**SMALL)
    nested = torch.nested.nested_tensor([torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    for wrong in (IDS.to_sparse(), nested):
        for call, others in ((model, (IDS,)), (model.encode, ()), (model.generate, (2,))):
            with pytest.raises(ValueError, match="src must be a dense tensor; found"):
                call(wrong, *others)
        with pytest.raises(ValueError, match="tgt must be a dense tensor; found"):
            model(IDS, wrong)
    with pytest.raises(TypeError, match="memory must be float32 beside a float32 weight; found float64"):
        model.decode(IDS, model.encode(IDS).double())


GRU = connections.DepthGRUCell(6, C)


@pytest.mark.parametrize(
    ("y", "h", "error", "text"),
    [
        (None, rows(2), TypeError, r"y must be a torch\.Tensor; found NoneType"),
        (torch.ones(2, 6), "a", TypeError, r"h must be a torch\.Tensor; found str"),
        (torch.ones(2, 6).long(), rows(2), TypeError, "y must be float32, float64, bfloat16 or float16"),
        (torch.ones(2, 6), rows(2) + 0j, TypeError, "h must be float32, float64, bfloat16 or float16"),
        (torch.ones(2, 6).to_sparse(), rows(2), ValueError, "y must be a dense tensor"),
        (torch.ones(2, 7), rows(2), ValueError, r"y must have shape \(..., 6\); found \(2, 7\)"),
        (torch.tensor(1.0), rows(2), ValueError, r"y must have shape \(..., 6\); found \(\)"),
        (torch.ones(2, 6), rows(3), ValueError, r"h must have shape \(2, 8\); found \(3, 8\)"),
        (torch.ones(1, 2, 6), rows(2), ValueError, r"h must have shape \(1, 2, 8\); found \(2, 8\)"),
        (torch.ones(2, 6).double(), rows(2), TypeError, "y must be float32 beside a float32 weight; found float64"),
        (torch.ones(2, 6), rows(2).to("meta"), ValueError, "h must be on the device of weight, cpu; found meta"),
    ],
)
def test_input_of_the_depth_wise_gru(y: Any, h: Any, error: type[Exception], text: str) -> None:
    assert GRU(torch.ones(2, 6), rows(2)).shape == (2, C)
    with pytest.raises(error, match=text):
        GRU(y, h)


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize("value", [None, "6", [6], -1, 0, torch.ones(2)], ids=lambda v: type(v).__name__)
def test_numbers_of_layers(name: str, value: Any) -> None:
    for options in ({}, {"connection": "deepnorm", "init": "deepnorm"}, {"memory": "multiscale"}):
        with pytest.raises((TypeError, ValueError), match=f"{name} must be (an int|at least 1); found"):
            dl.Transformer(**{**SMALL, **options, name: value})
    with pytest.raises((TypeError, ValueError), match=f"{name} must be (an int|at least 1); found"):
        dl.DepthLSTMTransformer(**{**SMALL, name: value})
