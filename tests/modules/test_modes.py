"""Training and evaluation: the effects of dropout, and the recomputation of gradient checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from layer_helpers import BATCH, LENGTH, MERGES, D, build
from torch import Tensor, nn

import depthlstm_fast as dl

MODULES = [dl, dl.reference]
LAYERS: list[tuple[str, dict[str, Any]]] = [("Encoder", {}), *(("Decoder", {"merge": merge}) for merge in MERGES)]
INNER = [{}, {"hidden": "ffn"}, {"sublayer": True}, {"hidden": "ffn", "sublayer": True}]


def inputs(kind: str) -> list[Tensor]:
    return [torch.randn(BATCH, LENGTH, D, dtype=torch.float64) for _ in range(2 if kind == "Encoder" else 3)]


def sites(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every submodule with its own dropout probability."""
    for name, inner in module.named_modules():
        if isinstance(getattr(inner, "dropout", None), float):
            yield name, inner


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_dropout_of_layers(kind: str, options: dict[str, Any], inner: dict[str, Any], module: Any) -> None:
    """Check each dropout site alone.

    In training it changes the output. In evaluation nothing changes and nothing is drawn.
    """
    layer = build(module, kind, **options, **inner)
    given = inputs(kind)
    wanted = layer(*given)
    names = [name for name, _ in sites(layer)]
    assert {"self_attn", "cell"} <= set(names)
    assert ("cross_attn" in names) == (kind == "Decoder")
    assert ("ffn_cell" in names) == inner.get("sublayer", False)
    for name, site in sites(layer):
        if name == "" and not layer.sublayer:
            continue  # the layer's own probability is that of the feed-forward network
        site.dropout = 0.5
        layer.train()
        assert not torch.equal(layer(*given)[1], wanted[1]), name
        layer.eval()
        state = torch.get_rng_state()
        found = layer(*given)
        assert torch.equal(torch.get_rng_state(), state), name
        assert torch.equal(found[0], wanted[0]), name
        assert torch.equal(found[1], wanted[1]), name
        site.training = True  # its own mode counts, not its parent's
        assert not torch.equal(layer(*given)[1], wanted[1]), name
        site.dropout = 0.0
        layer.train()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layer", [False, True], ids=["cell", "sublayer"])
def test_dropout_inside_the_feed_forward_network(layer: bool, module: Any) -> None:
    """Check that elements of the inner layer are zero or 1 / (1 - p) of their value in evaluation."""
    holder = build(module, "Encoder", dropout=0.25, hidden="ffn", sublayer=True)
    last = holder.linear2 if layer else holder.cell.ffn_out
    for attention in (holder.self_attn, *([holder.cell] if layer else [])):
        attention.eval()
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    given = inputs("Encoder")
    holder(*given)
    for inner in (holder, holder.cell):
        inner.eval()
    holder(*given)
    trained, evaluated = seen
    share = (trained == 0).double().mean().item()
    assert 0.15 < share < 0.35
    assert (evaluated != 0).all()
    torch.testing.assert_close(trained[trained != 0], evaluated[trained != 0] / 0.75, rtol=1e-12, atol=1e-12)


SMALL: dict[str, Any] = {
    "src_vocab": 11,
    "tgt_vocab": 13,
    "d_model": 8,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "max_len": 12,
    "dtype": torch.float64,
}
VARIANTS: list[dict[str, Any]] = [{}, {"hidden": "ffn", "merge": "concat"}, {"merge": "cells", "sublayer": True}]


def models(module: Any, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Return a model with dropout and the same without."""
    with_dropout = module.DepthLSTMTransformer(**SMALL, **options, dropout=0.5)
    without = module.DepthLSTMTransformer(**SMALL, **options, dropout=0.0)
    without.load_state_dict(with_dropout.state_dict())
    return with_dropout, without


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_dropout_of_models(options: dict[str, Any], module: Any) -> None:
    with_dropout, without = models(module, options)
    src, tgt = torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))
    wanted = without(src, tgt)
    assert not torch.allclose(with_dropout(src, tgt), wanted)
    with_dropout.eval()
    state = torch.get_rng_state()
    assert torch.equal(with_dropout(src, tgt), wanted)
    assert torch.equal(torch.get_rng_state(), state)
    with_dropout.input_dropout.train()
    assert not torch.allclose(with_dropout.encode(src), without.encode(src))
    memory = without.encode(src)
    assert not torch.allclose(with_dropout.decode(tgt, memory), without.decode(tgt, memory))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_in_training_mode_drops_nothing(
    use_cache: bool, beam_size: int, options: dict[str, Any], module: Any
) -> None:
    with_dropout, without = models(module, options)
    src = torch.randint(3, 11, (3, 6))
    arguments = {"use_cache": use_cache, "return_scores": True}
    wanted, scores = without.eval().generate(src, 8, beam_size, **arguments)
    state = torch.get_rng_state()
    found, found_scores = with_dropout.train().generate(src, 8, beam_size, **arguments)
    assert torch.equal(found, wanted)
    assert torch.equal(found_scores, scores)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(inner.training for inner in with_dropout.modules())


def stack(module: Any, kind: str) -> nn.Module:
    layer = build(module, kind, dropout=0.2, **({} if kind == "Encoder" else {"merge": "cells"}))
    return getattr(module, f"DepthLSTM{kind}")(layer, 3, init_cell="learned")


def counted(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return a list to which each layer is added when it runs."""
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    return calls


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_gradient_checkpointing(kind: str, module: Any) -> None:
    """Check that each layer runs once more in the backward pass.

    Only its inputs are kept, and the gradients are the same.
    """
    made = stack(module, kind)
    given = [x.requires_grad_() for x in inputs(kind)[1:]]
    calls = counted(made.layers)
    layers, gradients, kept = list(made.layers), [], []
    for made.gradient_checkpointing in (False, True):
        torch.manual_seed(2)
        saved: list[int] = []
        calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            output = made(*given)
        assert calls == layers
        torch.manual_seed(3)  # the recomputation starts again from the first mask
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        gradients.append(torch.autograd.grad(output, [*given, *made.parameters()], cotangent))
        assert calls == (layers + layers[::-1] if made.gradient_checkpointing else layers)
        kept.append(sum(saved))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_nothing_is_checkpointed_without_need(kind: str, module: Any) -> None:
    made = stack(module, kind).eval()
    given = [x.requires_grad_() for x in inputs(kind)[1:]]
    calls = counted(made.layers)
    made.gradient_checkpointing = True
    made(*given).square().sum().backward()
    assert len(calls) == len(made.layers)
    with torch.no_grad():
        twin = copy.deepcopy(made)
        twin.gradient_checkpointing = False
        assert torch.equal(made(*given), twin(*given))


def test_checkpointing_of_models() -> None:
    for module in MODULES:
        model = models(module, {})[1]
        layers = [*model.encoder.layers, *model.decoder.layers]
        calls = counted(layers)
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = True
        model(torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))).square().sum().backward()
        assert calls == layers + layers[::-1]
