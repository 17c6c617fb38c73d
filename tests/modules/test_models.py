"""DepthLSTMTransformer: fused against reference.

The tests cover embeddings and padding, compile, autocast, checkpointing, parameter groups and errors.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import depthlstm_fast as dl

SMALL: dict[str, Any] = {
    "src_vocab": 11,
    "tgt_vocab": 13,
    "d_model": 8,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dropout": 0.0,
}


def model(module: Any = dl, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return module.DepthLSTMTransformer(**{**SMALL, "dtype": dtype, **options})


def batch() -> tuple[Tensor, Tensor]:
    """Return ragged sources and targets, padded on the right."""
    src, tgt = torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))
    tgt[:, 0] = 1
    src[1, 4:] = tgt[1, 3:] = src[2, 2:] = 0
    return src, tgt


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"hidden": "ffn", "merge": "concat", "init": "glorot", "bias": False},
    {
        "merge": "cells",
        "sublayer": True,
        "norm": "joint",
        "positions": "learned",
        "init_cell": "learned",
        "forget_bias": 2.0,
    },
    {
        "share_cell": True,
        "tie_output": False,
        "tgt_vocab": 11,
        "share_embeddings": True,
        "final_norm": False,
        "norm": "none",
        "activation": "relu",
    },
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_fused_equals_reference(options: dict) -> None:
    reference, fused = model(dl.reference, **options), model(**options)
    fused.load_state_dict(reference.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in reference.named_parameters()]
    src, tgt = batch()
    tgt = tgt.clamp(max=options.get("tgt_vocab", 13) - 1)
    cotangent = torch.randn(3, 5, options.get("tgt_vocab", 13), dtype=torch.float64)
    found = []
    for each in (fused, reference):
        logits = each(src, tgt)
        found.append([logits, *torch.autograd.grad(logits, list(each.parameters()), cotangent)])
    assert_same(*found)
    reference.load_state_dict(fused.state_dict())


def test_reference_gradients_against_finite_differences() -> None:
    reference = dl.reference.DepthLSTMTransformer(
        4, 5, 4, 2, 1, 1, 5, 0.0, positions="learned", max_len=3, dtype=torch.float64, init_cell="learned"
    )
    parameters = {name: p.detach().clone().requires_grad_() for name, p in reference.named_parameters()}
    src, tgt = torch.tensor([[3, 2, 0], [1, 2, 3]]), torch.tensor([[1, 4], [1, 3]])

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(reference, dict(zip(parameters, values, strict=True)), (src, tgt))

    assert torch.autograd.gradcheck(run, tuple(parameters.values()), fast_mode=True)


def test_forward_is_encode_then_decode() -> None:
    each = model()
    src, tgt = batch()
    logits = each(src, tgt)
    memory = each.encode(src)
    assert_same([each.decode(tgt, memory, None, src == 0)], [logits])
    embedded = each.src_embedding(src) * math.sqrt(8) + each.src_positions.table[:6]
    assert_same([each.encoder(embedded, src_key_padding_mask=src == 0)], [memory])
    assert each.output.weight is each.tgt_embedding.weight
    assert_same([each(src, tgt, src == 0, tgt == 0)[tgt != 0]], [logits[tgt != 0]])


def test_causal_and_blind_to_padding() -> None:
    each = model()
    src, tgt = batch()
    logits = each(src, tgt)
    changed = tgt.clone()
    changed[:, 3:] = 7
    assert_same([each(src, changed)[:, :3]], [logits[:, :3]])
    for row, (source, target) in enumerate(((6, 5), (4, 3), (2, 5))):
        assert_same([each(src[row : row + 1, :source], tgt[row : row + 1, :target])[0]], [logits[row, :target]])


def test_sinusoidal_positions() -> None:
    table = dl.reference.models.sinusoidal_positions(50, 7)
    assert table.shape == (50, 7)
    for position, column in ((0, 0), (3, 4), (49, 6), (5, 5)):
        angle = position / 10000 ** ((column - column % 2) / 7)
        wanted = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[position, column].item() == pytest.approx(wanted, abs=1e-6)


def test_initialisation() -> None:
    lipschitz = dl.DepthLSTMTransformer(1000, 1000, 24, 2, 1, 1)
    bound = math.sqrt(2 / 1024)
    assert 0.99 * bound < lipschitz.src_embedding.weight.max() <= bound
    glorot = dl.DepthLSTMTransformer(1000, 1000, 24, 2, 1, 1, init="glorot")
    bound = math.sqrt(6 / 1024)
    assert 0.99 * bound < glorot.src_embedding.weight.max() <= bound
    forget = model(forget_bias=2.0)
    assert all(layer.cell.norm.bias[1].eq(2).all() for layer in [*forget.encoder.layers, *forget.decoder.layers])
    before = copy.deepcopy(forget.state_dict())
    forget.reset_parameters()
    changed = {name for name, value in forget.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("weight") and "norm" not in name}


def test_copies_keep_ties() -> None:
    each = model(share_embeddings=True, tgt_vocab=11, share_cell=True)
    src, tgt = batch()
    tgt = tgt.clamp(max=10)
    for twin in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
        assert twin.output.weight is twin.tgt_embedding.weight is twin.src_embedding.weight
        assert twin.encoder.layers[0].cell is twin.encoder.layers[1].cell
        assert_same([twin(src, tgt)], [each(src, tgt)], 0)


def test_compiled_without_graph_breaks_or_recompiles() -> None:
    each = model(dtype=torch.float32, merge="concat", num_encoder_layers=1, num_decoder_layers=1)
    torch._dynamo.reset()  # else a compilation by an earlier test of the process counts
    src, tgt = batch()
    compiled = torch.compile(each, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 4, 3):
            source, target = src[:, : length + 1].clone(), tgt[:, :length].clone()
            assert_same([compiled(source, target)], [each(source, target)], 1e-4)


def test_compiled_gradients() -> None:
    each = model(dtype=torch.float32, num_encoder_layers=1, num_decoder_layers=1)
    src, tgt = batch()
    gradients = []
    for function in (each, torch.compile(each, fullgraph=True, backend="aot_eager")):
        logits = function(src, tgt)
        cotangent = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        gradients.append(torch.autograd.grad(logits, list(each.parameters()), cotangent))
    assert_same(*gradients, 1e-4)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_autocast(options: dict) -> None:
    each = model(dtype=torch.float32, **options)
    src, tgt = batch()
    tgt = tgt.clamp(max=options.get("tgt_vocab", 13) - 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = each(src, tgt)
        ids = each.generate(src, 4, beam_size=2)
    assert ids.shape[0] == 3
    assert (logits - each(src, tgt)).abs().max() < 0.1
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in each.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    each = model(dropout=0.2)
    src, tgt = batch()
    gradients = []
    for wrapped in (False, True):
        for layer in (*each.encoder.layers, *each.decoder.layers):
            if wrapped:
                inner = layer.forward
                layer.forward = lambda *args, inner=inner, **options: torch.utils.checkpoint.checkpoint(
                    lambda *tensors: inner(*tensors, **options), *args, use_reentrant=reentrant
                )
        torch.manual_seed(4)
        logits = each(src, tgt)
        each.zero_grad()
        logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape))
        gradients.append([p.grad.clone() for p in each.parameters()])
    assert_same(*gradients)


def test_param_groups() -> None:
    each = model(init_cell="learned", positions="learned", hidden="ffn", sublayer=True)
    decay, plain = dl.param_groups(each, 0.1)
    assert decay["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in each.named_parameters()}
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    for parameter in plain["params"]:
        name = names[id(parameter)]
        assert name.endswith(("bias", "initial_cell")) or "norm" in name
    for parameter in decay["params"]:
        name = names[id(parameter)]
        assert name.endswith("weight")
        assert "norm" not in name
        assert parameter.dim() == 2
    assert any(p.dim() == 2 for p in plain["params"])
    torch.optim.AdamW(dl.param_groups(each))
    each.src_embedding.weight.requires_grad_(False)
    assert all(p.requires_grad for group in dl.param_groups(each) for p in group["params"])
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative; found -1"):
        dl.param_groups(each, -1)
    with pytest.raises(TypeError, match="weight_decay must be a float; found str"):
        dl.param_groups(each, "0.1")  # type: ignore[arg-type]


def test_what_is_inside_a_norm_does_not_decay() -> None:
    cell = dl.DepthLSTMCell(8, 16)
    nn.utils.parametrizations.weight_norm(cell.norm, "weight")
    decaying, kept = dl.param_groups(cell, 0.1)
    assert [id(p) for p in decaying["params"]] == [id(cell.gates.weight)]
    assert len(kept["params"]) == 4  # gates.bias, norm.bias and the two of the parametrisation
    for function in (dl.param_groups, dl.fold_output_projections):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; found NoneType"):
            function(None)


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_constructor_errors(module: Any) -> None:
    for options, error, text in (
        ({"src_vocab": 0}, ValueError, "src_vocab must be at least 1; found 0"),
        ({"tgt_vocab": 1.5}, TypeError, "tgt_vocab must be an int; found float"),
        ({"eos_id": 13}, ValueError, "eos_id must be below the vocabulary size, 13; found 13"),
        ({"pad_id": 11}, ValueError, "pad_id must be below the vocabulary size, 11; found 11"),
        ({"bos_id": -1}, ValueError, "bos_id must be at least 0; found -1"),
        (
            {"share_embeddings": True},
            ValueError,
            "tgt_vocab must equal src_vocab, 11, with share_embeddings=True; found 13",
        ),
        ({"positions": "rotary"}, ValueError, "positions must be one of 'sinusoidal', 'learned'; found 'rotary'"),
        ({"max_len": 0}, ValueError, "max_len must be at least 1; found 0"),
        ({"num_encoder_layers": 0}, ValueError, "num_encoder_layers must be at least 1; found 0"),
        ({"init": "zero"}, ValueError, "init must be one of"),
    ):
        with pytest.raises(error, match=text):
            model(module, **options)


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_forward_errors(module: Any) -> None:
    each = model(module, max_len=6)
    src, tgt = batch()
    for arguments, error, text in (
        ((src.float(), tgt), TypeError, "src must be int64; found torch.float32"),
        ((src, tgt.int()), TypeError, "tgt must be int64; found torch.int32"),
        ((src.tolist(), tgt), TypeError, "src must be a torch.Tensor; found list"),
        ((src, None), TypeError, "tgt must be a torch.Tensor; found NoneType"),
        ((src[0], tgt), ValueError, r"tgt must have the batch size of src, \(6,\); found \(3,\)"),
        (
            (src[0], tgt[0][:1].expand(6)),
            ValueError,
            r"src must have shape \(batch, length\), neither of them 0; found \(6,\)",
        ),
        ((src[:, :0], tgt), ValueError, r"neither of them 0; found \(3, 0\)"),
        ((src[:0], tgt[:0]), ValueError, r"neither of them 0; found \(0, 6\)"),
        ((src, tgt[:2]), ValueError, r"tgt must have the batch size of src, \(3,\); found \(2,\)"),
        ((src + 5, tgt), ValueError, "src must hold ids from 0 to 10; found 1[0-9]"),
        ((src, tgt - 5), ValueError, "tgt must hold ids from 0 to 12; found -"),
        ((src.repeat(1, 2), tgt), ValueError, "src must have at most max_len, 6, tokens; found 12"),
        ((src, tgt, torch.zeros(3, 2)), ValueError, "src_key_padding_mask must have shape"),
    ):
        with pytest.raises(error, match=text):
            each(*arguments)


def test_param_groups_of_what_a_norm_shares() -> None:
    """Check a parameter that a norm and another module hold.

    It counts as the norm's, in either order, and comes once.
    """
    for reverse in (False, True):
        modules = [nn.LayerNorm((3, 3)), nn.Linear(3, 3, bias=False)][:: -1 if reverse else 1]
        modules[0].weight = modules[1].weight
        decay, plain = dl.param_groups(nn.Sequential(*modules))
        assert not decay["params"]
        assert sum(parameter is modules[0].weight for parameter in plain["params"]) == 1
