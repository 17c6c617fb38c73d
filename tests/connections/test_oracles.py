"""Against other packages' implementations, in the versions they were read in; skipped where not installed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from connection_helpers import C, normal, randomise
from torch import nn

import depthlstm_fast as dl


def oracle(package: str, version: str, module: str) -> Any:
    """A module of ``package``; conventions may change with its versions, so that another one is skipped."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if found != version:
        pytest.skip(f"{package} {version} is the oracle; {found} is installed")
    return pytest.importorskip(module, exc_type=ImportError)


@pytest.mark.parametrize("sources", [1, 2, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_layer_attend_is_flas(sources: int, normed: bool) -> None:
    fla = oracle("fla-core", "0.6.0", "fla.ops.attnres.naive")
    xs = [normal(2, 3, C).float() for _ in range(sources)]
    query, key_weight, weight = (normal(C).float() for _ in range(3))
    wanted = fla.naive_attnres(query, xs, key_weight, weight if normed else None)
    found = dl.layer_attend(xs, query, key_weight, weight if normed else None, norm="rms")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_gru_over_depth_is_x_transformers() -> None:
    package = oracle("x-transformers", "2.31.10", "x_transformers.x_transformers")
    gating = randomise(package.GRUGating(C))
    cell = dl.connections.DepthGRUCell(C, C)
    for own, theirs in (("input_proj", "ih"), ("state_proj", "hh")):
        linear: nn.Module = getattr(cell, own)
        linear.load_state_dict({kind: getattr(gating.gru, f"{kind}_{theirs}") for kind in ("weight", "bias")})
    y, h = normal(2, 3, C).float(), normal(2, 3, C).float()
    torch.testing.assert_close(cell(y, h), gating(y, h), rtol=1e-5, atol=1e-5)


SMALL = {"embed_dim": C, "attention_heads": 2, "ffn_embed_dim": 4 * C}


def torchscale_stacks(encoder_layers: int, decoder_layers: int, deepnorm: bool) -> tuple[Any, Any, Any]:
    """torchscale's encoder and decoder of a translation model, and its encoder on its own."""
    config = oracle("torchscale", "0.3.0", "torchscale.architecture.config")
    encoders = oracle("torchscale", "0.3.0", "torchscale.architecture.encoder")
    decoders = oracle("torchscale", "0.3.0", "torchscale.architecture.decoder")
    sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in SMALL.items()}
    sizes |= {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    arguments = config.EncoderDecoderConfig(**sizes, deepnorm=deepnorm, subln=False)
    torch.manual_seed(0)
    both = encoders.Encoder(arguments, is_encoder_decoder=True), decoders.Decoder(arguments, is_encoder_decoder=True)
    return *both, encoders.Encoder(arguments)


def scaled_by(theirs: tuple[Any, Any], name: str) -> float:
    """What DeepNorm multiplies a drawn matrix by, in torchscale."""
    with_it, without = (dict(stack.named_parameters())[name] for stack in theirs)
    factor = (with_it / without).flatten()
    torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    return float(factor[0])


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(2, 2), (3, 1), (1, 4)])
def test_deepnorms_constants_are_torchscales(encoder_layers: int, decoder_layers: int) -> None:
    encoder, decoder, alone = torchscale_stacks(encoder_layers, decoder_layers, True)
    plain = torchscale_stacks(encoder_layers, decoder_layers, False)
    model = dl.Transformer(
        11, 11, C, 2, encoder_layers, decoder_layers, connection="deepnorm", init="deepnorm", dropout=0.0
    )
    own = dl.Encoder(C, 2, encoder_layers, connection="deepnorm", init="deepnorm")
    for theirs, ours in ((encoder, model.encoder), (decoder, model.decoder), (alone, own)):
        assert [layer.alpha for layer in theirs.layers] == pytest.approx([ours.connection.a] * len(theirs.layers))
    for name in ("self_attn.v_proj", "self_attn.out_proj", "ffn.fc1", "ffn.fc2"):
        found = scaled_by((alone, plain[2]), f"layers.0.{name}.weight")
        assert found == pytest.approx(own.beta, rel=1e-5)
        found = scaled_by((decoder, plain[1]), f"layers.0.{name}.weight")
        assert found == pytest.approx(model.decoder.beta, rel=1e-5)
        # torchscale divides by the depth's root / 1.15, where the paper multiplies by 0.87 over that root
        found = scaled_by((encoder, plain[0]), f"layers.0.{name}.weight")
        assert found / 1.15 == pytest.approx(model.encoder.beta / 0.87, rel=1e-5)
    for name in ("q_proj", "k_proj"):
        assert scaled_by((encoder, plain[0]), f"layers.0.self_attn.{name}.weight") == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_a_deepnorm_encoder_is_torchscales(layers: int) -> None:
    _, _, theirs = torchscale_stacks(layers, 1, True)
    ours = dl.Encoder(C, 2, layers, connection="deepnorm", dropout=0.0, layer_norm_eps=1e-5, batch_first=True)
    randomise(theirs)
    norms = iter(ours.connection.sum_norms)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        attention, network = other.self_attn, other.ffn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        for kind in ("weight", "bias"):
            stacked = torch.cat([getattr(projection, kind) for projection in projections])
            getattr(layer.self_attn.in_proj, kind).data.copy_(stacked)
        layer.self_attn.out_proj.load_state_dict(attention.out_proj.state_dict())
        layer.linear1.load_state_dict(network.fc1.state_dict())
        layer.linear2.load_state_dict(network.fc2.state_dict())
        for norm in (other.self_attn_layer_norm, other.final_layer_norm):
            next(norms).load_state_dict(norm.state_dict())
    x = normal(2, 5, C).float()
    wanted = theirs(None, token_embeddings=x, features_only=True)["encoder_out"]
    torch.testing.assert_close(ours(x), wanted, rtol=1e-5, atol=1e-5)
