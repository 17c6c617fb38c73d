"""Hooks, replaced forwards, wrappers and adapters on modules.

They act with the cache of decoding as without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HAS_CPP
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import depthlstm_fast as dl

SIZES: dict[str, Any] = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dropout": 0.0,
    "max_len": 24,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"merge": "concat", "hidden": "ffn"},
    {"merge": "cells", "sublayer": True, "init_cell": "learned", "share_cell": True},
]
each_twin = pytest.mark.parametrize("module", [dl, dl.reference], ids=["fused", "reference"])
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=str)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Adapter(nn.Module):
    """A wrapper with its own parameter, which scales the weight while the wrapped module runs, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(2.0))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        weight = self.base._parameters.pop("weight")
        self.base.weight = weight * self.scale
        try:
            return self.base(*arguments, **options)
        finally:
            del self.base.weight
            self.base.register_parameter("weight", weight)


def doubled(cell: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """Return h with twice the weight of the normalisation."""
    other = copy.deepcopy(cell)
    with torch.no_grad():
        other.norm.weight.mul_(2)
    return other(x, state)[0].detach()


def put_hook(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))
    return norm


def put_pre_hook(norm: nn.Module) -> nn.Module:
    """Let the weights arrive when the module is called, as with accelerate.cpu_offload."""
    real = {name: 2 * p.detach() if name == "weight" else p.detach().clone() for name, p in norm.named_parameters()}
    for name, value in real.items():
        setattr(norm, name, nn.Parameter(torch.empty_like(value, device="meta")))
    norm.register_forward_pre_hook(
        lambda module, inputs: [setattr(module, n, nn.Parameter(v)) for n, v in real.items()] and None
    )
    return norm


def put_parametrization(norm: nn.Module) -> nn.Module:
    parametrize.register_parametrization(norm, "weight", Double())
    return norm


def put_forward(norm: nn.Module) -> nn.Module:
    original = norm.forward
    norm.forward = lambda *given: (2 * original(*given)[0], original(*given)[1])
    return norm


def put_pruning(norm: nn.Module) -> nn.Module:
    prune.identity(norm, "weight")
    with torch.no_grad():
        norm.weight_orig.mul_(2)
    return norm


@each_twin
@pytest.mark.parametrize("hidden", ["linear", "ffn"])
@pytest.mark.parametrize("norm", ["gate", "joint"])
@pytest.mark.parametrize("put", [put_hook, put_pre_hook, put_parametrization, put_forward, put_pruning, Adapter])
def test_what_is_put_on_the_norm_acts(
    module: Any, hidden: str, norm: str, put: Callable[[nn.Module], nn.Module]
) -> None:
    cell = module.DepthLSTMCell(8, 8, hidden=hidden, norm=norm)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, state = torch.randn(5, 8), (torch.randn(5, 8), torch.randn(5, 8))
    wanted = doubled(cell, x, state)
    cell.norm = put(cell.norm)
    for _ in range(2):  # pruning fails in the second backward pass if the module is not called
        h, c = cell(x, state)
        torch.testing.assert_close(h, wanted, rtol=1e-5, atol=1e-6)
        torch.autograd.backward((h, c), (torch.randn_like(h), torch.randn_like(c)))
    if module is dl and HAS_CPP:
        assert dl.last_backend() == "cpp"
    missing = [name for name, p in cell.named_parameters() if p.grad is None]
    assert not missing


@each_twin
def test_the_norm_is_called_with_something_wrappers_can_pass_on(module: Any) -> None:
    cell, seen = module.DepthLSTMCell(8, 8), []
    cell.norm.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs))
    cell(torch.randn(5, 8))
    assert [tuple(x.shape) for (x,) in seen] == [(5, 8)]


@each_twin
@pytest.mark.parametrize("number", [1, 3])
def test_backward_hooks_of_each_norm_run(module: Any, number: int) -> None:
    encoder, calls = module.DepthLSTMEncoder(module.DepthLSTMEncoderLayer(16, 2, dropout=0.0), number), []
    for layer in encoder.layers:
        layer.cell.norm.register_full_backward_hook(
            lambda norm, inputs, outputs: calls.append([g.shape for g in outputs])
        )
    encoder(torch.randn(3, 2, 16, requires_grad=True)).square().sum().backward()
    assert calls == [[(4, 16), (4, 16)]] * number


@each_twin
def test_a_norm_of_another_kind_is_refused(module: Any) -> None:
    cell = module.DepthLSTMCell(8, 8)
    cell.norm = nn.Identity()
    with pytest.raises(
        TypeError, match=r"norm must be a GateNorm, or wrap one, and return \(weight, bias\); found Identity"
    ):
        cell(torch.randn(3, 8))


def test_what_a_call_of_the_norm_returns_outlives_its_parameters() -> None:
    # FSDP2 frees the gathered parameters of a module when its call ends
    norm = dl.reference.GateNorm(4, 8)
    weight, bias = norm()
    with torch.no_grad():
        norm.weight.fill_(torch.nan)
        norm.bias.fill_(torch.nan)
    assert torch.equal(weight, torch.ones(4, 8))
    assert torch.equal(bias, torch.zeros(4, 8))


class TwiceAttention(dl.reference.SelfAttention):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*arguments, **options)


class TwiceCross(dl.reference.CrossAttention):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*arguments, **options)


@each_variant
def test_attention_of_another_class_is_called(options: dict[str, Any]) -> None:
    models = [module.DepthLSTMTransformer(9, 7, **SIZES, **options).eval() for module in (dl, dl.reference)]
    models[0].load_state_dict(models[1].state_dict())
    for model in models:
        for layer in (*model.encoder.layers, *model.decoder.layers):
            layer.self_attn.__class__ = TwiceAttention
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.__class__ = TwiceCross
    dl.fold_output_projections(models[0])
    src, tgt = torch.randint(3, 9, (3, 6)), torch.randint(3, 7, (3, 5))
    with torch.no_grad():
        torch.testing.assert_close(models[0](src, tgt), models[1](src, tgt), rtol=1e-4, atol=1e-5)


def negated(output: Any) -> Any:
    return (-output[0], output[1]) if isinstance(output, tuple) else -output


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda each, inputs, output: negated(output))


def hook_with_options(module: nn.Module) -> None:
    module.register_forward_hook(lambda each, inputs, options, output: negated(output), with_kwargs=True)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda each, inputs: (-inputs[0], *inputs[1:]))


def memory_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda each, inputs: (inputs[0], 3 * inputs[1], *inputs[2:]))


def replaced(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *arguments, **options: negated(original(*arguments, **options))


def replaced_by_the_old_signature(module: nn.Module) -> None:
    """Replace the forward by one without a cache argument."""
    original = module.forward
    if isinstance(module, dl.reference.DepthLSTMDecoder):
        module.forward = lambda tgt, memory, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal: negated(
            original(tgt, memory, None, None, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal)
        )
    else:

        def forward(
            tgt,
            memory,
            state,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        ):  # type: ignore[no-untyped-def]
            found = original(
                tgt,
                memory,
                state,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
            return negated(found)

        module.forward = forward


def overridden(module: nn.Module) -> None:
    plain = type(module)
    module.__class__ = type("Own", (plain,), {"forward": lambda self, *a, **k: negated(plain.forward(self, *a, **k))})


@each_twin
@each_variant
@pytest.mark.parametrize("name", ["decoder", "decoder.layers.0", "decoder.layers.1"])
@pytest.mark.parametrize(
    "put", [hook, hook_with_options, pre_hook, memory_pre_hook, replaced, replaced_by_the_old_signature, overridden]
)
def test_the_cache_changes_nothing(
    module: Any, options: dict[str, Any], name: str, put: Callable[[nn.Module], None]
) -> None:
    model = module.DepthLSTMTransformer(9, 7, **SIZES, **options).eval()
    src = torch.randint(3, 9, (3, 6))
    src[1, 3:] = 0
    plain = model.generate(src, 8, beam_size=2, return_scores=True)
    put(model.get_submodule(name))
    tokens, scores = model.generate(src, 8, beam_size=2, use_cache=False, return_scores=True)
    cached = model.generate(src, 8, beam_size=2, return_scores=True)
    assert torch.equal(cached[0], tokens)
    torch.testing.assert_close(cached[1], scores, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[1], scores, atol=1e-4)  # the change had an effect


@each_twin
@each_variant
@pytest.mark.parametrize(
    "part", ["self_attn", "cross_attn", "cell", "self_attn.in_proj", "cross_attn.out_proj", "cell.gates", "cell.norm"]
)
def test_parts_of_a_layer_are_called_with_the_cache(module: Any, options: dict[str, Any], part: str) -> None:
    model = module.DepthLSTMTransformer(9, 7, **SIZES, **options).eval()
    dl.fold_output_projections(model)
    src, counts = torch.randint(3, 9, (2, 6)), []
    model.get_submodule(f"decoder.layers.1.{part}").register_forward_hook(
        lambda each, inputs, output: counts.append(1) or negated(output)
    )
    scores = [model.generate(src, 6, use_cache=cache, return_scores=True)[1] for cache in (True, False)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    assert counts


class Wrapper(nn.Module):
    """A wrapper that only passes every call on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)


@each_twin
@pytest.mark.parametrize("name", ["decoder", "decoder.layers.0", "decoder.layers.1", "encoder"])
def test_wrapped_modules_generate(module: Any, name: str) -> None:
    model = module.DepthLSTMTransformer(9, 7, **SIZES).eval()
    src = torch.randint(3, 9, (2, 6))
    wanted = model.generate(src, 6, beam_size=2)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Wrapper(model.get_submodule(name)))
    assert torch.equal(model.generate(src, 6, beam_size=2), wanted)


@each_twin
@pytest.mark.parametrize("part", ["self_attn", "cross_attn"])
def test_attention_without_a_cache_argument(module: Any, part: str) -> None:
    model = module.DepthLSTMTransformer(9, 7, **SIZES).eval()
    attention = model.get_submodule(f"decoder.layers.0.{part}")
    original, src = attention.forward, torch.randint(3, 9, (2, 6))
    if part == "self_attn":
        attention.forward = lambda x, mask=None, is_causal=False: -original(x, mask, is_causal)
    else:
        attention.forward = lambda x, memory, mask=None, is_causal=False: -original(x, memory, mask, is_causal)
    scores = [model.generate(src, 6, use_cache=cache, return_scores=True)[1] for cache in (True, False)]
    torch.testing.assert_close(*scores)


def test_a_wrapper_that_drops_the_cache_is_told() -> None:
    model = dl.DepthLSTMTransformer(9, 7, **SIZES).eval()
    layer = model.decoder.layers[1]
    original = layer.forward
    layer.forward = lambda tgt, memory, state=None, **options: original(tgt, memory, state)
    with pytest.raises(
        ValueError, match=r"use_cache must be False: decoder.layers.1 passes its cache by.*found 0.*wanted 1"
    ):
        model.generate(torch.randint(3, 9, (2, 6)), 6)


def test_the_users_own_step_is_used() -> None:
    model = dl.DepthLSTMTransformer(9, 7, **SIZES).eval()
    src, calls = torch.randint(3, 9, (2, 6)), []
    wanted, step = model.generate(src, 6), model.decoder.step
    model.decoder.step = lambda *arguments: calls.append(1) or step(*arguments)
    assert torch.equal(model.generate(src, 6), wanted)
    assert len(calls) == wanted.shape[1]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_with_a_cache(batch_first: bool) -> None:
    layer = dl.DepthLSTMDecoderLayer(16, 2, dropout=0.0, batch_first=batch_first).eval()
    tgt, memory = torch.randn(2, 5, 16), torch.randn(2, 4, 16)

    def outside(tensor: Tensor) -> Tensor:
        return tensor if batch_first else tensor.transpose(0, 1)

    with torch.no_grad():
        h, c = layer(outside(tgt), outside(memory), tgt_is_causal=True)
        for call in ("forward", "step"):
            cache, found = layer.new_cache(memory), []
            for position in range(5):
                one = tgt[:, position : position + 1]
                state = layer.step(one, cache) if call == "step" else layer(outside(one), outside(memory), cache=cache)
                found.append(state if call == "step" else tuple(map(outside, state)))
            torch.testing.assert_close(torch.cat([pair[0] for pair in found], 1), outside(h), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.cat([pair[1] for pair in found], 1), outside(c), rtol=1e-5, atol=1e-6)


@each_twin
def test_errors_of_a_step(module: Any) -> None:
    layer = module.DepthLSTMDecoderLayer(16, 2, batch_first=True)
    memory = torch.randn(2, 4, 16)
    cache = layer.new_cache(memory)
    with pytest.raises(TypeError, match="cache must be a DecoderCache, as new_cache makes it; found list"):
        layer(torch.randn(2, 1, 16), memory, cache=[cache])
    with pytest.raises(ValueError, match="tgt must hold one position with a cache; found 3"):
        layer(torch.randn(2, 3, 16), memory, cache=cache)
    with pytest.raises(ValueError, match="tgt must have a multiple of the cache's 2 sources as its batch; found 3"):
        layer(torch.randn(3, 1, 16), memory, cache=cache)
    with pytest.raises(ValueError, match=r"memory must have shape \(batch, length, 16\); found \(4, 16\)"):
        layer.new_cache(memory[0])
    layer(torch.randn(2, 1, 16), memory, cache=cache)
    with pytest.raises(ValueError, match="tgt must have the batch that the cache began with, 2; found 4"):
        layer(torch.randn(4, 1, 16), memory, cache=cache)
    decoder = module.DepthLSTMDecoder(layer, 2)
    for wrong, found in ((3, "int"), ([cache], "a list of 1")):
        with pytest.raises(
            ValueError, match=f"caches must be a list of 2, one a layer, as new_caches makes it; found {found}"
        ):
            decoder(torch.randn(2, 1, 16), memory, caches=wrong)
    with pytest.raises(TypeError, match="caches must be a list, as new_caches makes it; found list"):
        decoder.step(torch.randn(2, 1, 16), [])
    with pytest.raises(TypeError, match=r"memory must be a torch\.Tensor; found NoneType"):
        decoder(torch.randn(2, 1, 16), None)
