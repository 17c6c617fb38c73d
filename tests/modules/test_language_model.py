"""dl.LanguageModel: values against implementations that are not ours, its twin, padding, packing, training."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_model_helpers import F64, SMALL, VOCAB, assert_close, by_hand, model, randomise, tokens
from torch import Tensor, nn

import depthlstm_fast as dl

NAMES = dl.connections.names()
LLAMA = {"connection": "pre-norm", "norm": "rms", "ffn": "swiglu", "bias": False, "kv_heads": 2}
TWINS = [
    {},
    {"kv_heads": 2, "norm": "rms", "feed_forward": True, "ffn": "swiglu"},
    {"positions": "learned", "tie_output": False, "feed_forward": True, "bias": False},
    {"connection": "pre-norm", "positions": "sinusoidal", "kv_heads": 1},
    {"connection": "pre-norm", "positions": "none", "norm": "rms", "ffn": "swiglu"},
    {"connection": "pre-norm", "feed_forward": False},
]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_values_are_those_of_a_model_written_out(kv_heads: int) -> None:
    each, ids = model(**{**LLAMA, "kv_heads": kv_heads, "rope_theta": 500.0}), tokens(2, 7)
    wanted = torch.stack([by_hand(each, row) for row in ids])
    assert_close(each(ids), wanted)


def test_values_are_those_of_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    each = model(**LLAMA, tie_output=False, layer_norm_eps=1e-5, dim_feedforward=40)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(each.embedding.weight * 4)  # ours is multiplied by sqrt(d_model)
        llama.lm_head.weight.copy_(each.output.weight)
        llama.model.norm.weight.copy_(each.decoder.connection.final_norm.weight)
        norms = each.decoder.connection.read_norms
        for index, (theirs, ours) in enumerate(zip(llama.model.layers, each.decoder.layers, strict=True)):
            attention = theirs.self_attn
            for linear, part in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj),
                ours.self_attn.in_proj.weight.split(ours.self_attn.parts),
                strict=True,
            ):
                linear.weight.copy_(part)
            attention.o_proj.weight.copy_(ours.self_attn.out_proj.weight)
            theirs.mlp.gate_proj.weight.copy_(ours.linear1.weight[:40])
            theirs.mlp.up_proj.weight.copy_(ours.linear1.weight[40:])
            theirs.mlp.down_proj.weight.copy_(ours.linear2.weight)
            theirs.input_layernorm.weight.copy_(norms[2 * index].weight)
            theirs.post_attention_layernorm.weight.copy_(norms[2 * index + 1].weight)
    ids = tokens(3, 9)
    loss, logits = each(ids, labels=ids)
    wanted = llama(ids, labels=ids)
    # its norms compute in float32
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, wanted.loss.double(), rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = llama(ids, attention_mask=mask, position_ids=positions).logits[1, 4:]
    torch.testing.assert_close(each(ids, mask)[1, 4:], padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", TWINS, ids=str)
def test_twin_has_one_state_dict_and_the_same_values_and_gradients(options: dict[str, Any]) -> None:
    fused, twin = model(**options), dl.reference.LanguageModel(**{**SMALL, **options})
    assert list(fused.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(fused.state_dict())
    ids = tokens(2, 8)
    results = []
    for each in (fused, twin):
        loss, logits = each(ids, labels=ids)
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
        results.append([loss, logits, *torch.autograd.grad((logits * cotangent).sum() + loss, list(each.parameters()))])
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted)
    back = dl.LanguageModel(**{**SMALL, **options})
    back.load_state_dict(twin.state_dict())
    assert torch.equal(back(ids), fused(ids))
    for each in (fused, twin):
        each.reset_parameters()
        assert all(parameter.isfinite().all() for parameter in each.parameters())
    assert torch.equal(fused.generate(ids, 4), fused.generate(ids, 4, use_cache=False))


def test_gradients_of_the_twin_are_those_of_differences() -> None:
    sizes = {**SMALL, "vocab_size": 5, "d_model": 4, "nhead": 2, "num_layers": 1, "kv_heads": 1}
    for connection in ("depth-lstm", "pre-norm"):
        twin = randomise(dl.reference.LanguageModel(**sizes, connection=connection, feed_forward=True, ffn="swiglu"))
        ids, mask = torch.randint(0, 5, (2, 4)), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        names, values = zip(*twin.named_parameters(), strict=True)

        def loss(*inputs: Tensor, names: Any = names, twin: nn.Module = twin, ids: Any = ids, mask: Any = mask) -> Any:
            given = dict(zip(names, inputs, strict=True))
            return torch.func.functional_call(twin, given, (ids, mask, ids))[0]

        assert torch.autograd.gradcheck(loss, tuple(value.detach().requires_grad_() for value in values))


@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_packing_change_no_real_token(name: str, positions: str) -> None:
    each = model(connection=name, positions=positions, kv_heads=2)
    rows = [tokens(1, length) for length in (5, 3, 7)]
    wanted = [each(row)[0] for row in rows]
    for side in ("left", "right", "both"):
        ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
        for index, row in enumerate(rows):
            first = {"left": 11 - row.shape[1], "right": 0, "both": 2}[side]
            ids[index, first : first + row.shape[1]], mask[index, first : first + row.shape[1]] = row[0], 1
        for found in (each(ids, mask), each(ids, mask.bool())):
            for index in range(3):
                assert_close(found[index][mask[index] == 1], wanted[index])
    packed = torch.cat(rows, 1)
    by_ends = each(packed, cu_seqlens=torch.tensor([0, 5, 8, 15], dtype=torch.int32))
    numbers = torch.tensor([4] * 5 + [9] * 3 + [4] * 7)[None]  # a number that comes back is another document
    assert_close(by_ends[0], torch.cat(wanted))
    assert torch.equal(each(packed, document_ids=numbers), by_ends)
    tail = F.pad(packed, (0, 4))
    mask = F.pad(torch.ones_like(packed), (0, 4))
    assert_close(each(tail, mask, document_ids=F.pad(numbers, (0, 4), value=-1))[0, :15], by_ends[0])


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_later_ones(name: str) -> None:
    each, ids = model(connection=name), tokens(2, 8)
    later = ids.clone()
    later[:, 5] = (later[:, 5] + 1) % VOCAB
    found, wanted = each(later), each(ids)
    assert torch.equal(found[:, :5], wanted[:, :5])
    assert not torch.isclose(found[:, 5:], wanted[:, 5:]).all(-1).any()


def test_positions_matter_but_with_none() -> None:
    """One layer of attention without positions gives the last token the same whatever the order before it."""
    ids = torch.arange(3, 9)[None]
    swapped = ids[:, [1, 0, 2, 4, 3, 5]]
    for positions in ("rope", "sinusoidal", "learned", "none"):
        each = model(positions=positions, num_layers=1)
        same = torch.allclose(each(ids)[:, -1], each(swapped)[:, -1], atol=1e-12)
        assert same == (positions == "none"), positions


def test_loss_is_the_mean_over_what_counts() -> None:
    each = model()
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    labels = ids.clone()
    labels[1, 2] = -100
    loss, logits = each(ids, mask, labels)
    logp = logits.log_softmax(-1)
    counted = [(0, 2), (0, 3), (0, 4), (1, 0), (1, 2), (1, 3)]  # not (1, 1): its label is left out
    assert_close(loss, -torch.stack([logp[row, t, labels[row, t + 1]] for row, t in counted]).mean())
    packed, ends = ids.view(1, 12), torch.tensor([0, 4, 12])
    loss, logits = each(packed, labels=packed, cu_seqlens=ends)
    logp = logits.log_softmax(-1)[0]
    counted = [t for t in range(11) if t != 3]
    assert_close(loss, -torch.stack([logp[t, packed[0, t + 1]] for t in counted]).mean())
    loss, _ = each(ids, labels=torch.full_like(ids, -100))
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_every_connection_learns(name: str) -> None:
    torch.manual_seed(0)
    each = dl.LanguageModel(**{**SMALL, "dtype": torch.float32}, connection=name, kv_heads=2, norm="rms", ffn="swiglu")
    optimiser, ids = torch.optim.AdamW(dl.param_groups(each), lr=0.01), tokens(4, 10)
    losses = []
    for _ in range(6):
        loss, _ = each(ids, labels=ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    for module in each.decoder.connection.modules():  # gates keep their own normalisation
        assert not isinstance(module, nn.LayerNorm), module


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    for cls in (dl.LanguageModel, dl.reference.LanguageModel):
        if cls is dl.reference.LanguageModel and name not in ("depth-lstm", "pre-norm"):
            continue
        each, ids = randomise(cls(**{**SMALL, "dropout": 0.2}, connection=name)), tokens(2, 6)
        found = []
        for on in (False, True):
            each.decoder.gradient_checkpointing = on
            torch.manual_seed(1)
            found.append(torch.autograd.grad(each(ids, labels=ids)[0], list(each.parameters()), allow_unused=True))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["depth-lstm", "pre-norm", "attention-residuals"])
def test_compiled_without_a_break(name: str) -> None:
    each = model(connection=name, kv_heads=2)
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8):
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
        mask[0, :2] = 0
        loss, logits = compiled(ids, mask, ids)
        wanted = each(ids, mask, ids)
        assert_close(loss, wanted[0])
        assert_close(logits, wanted[1])
        numbers = torch.arange(length)[None].expand(2, -1) // 3
        assert_close(compiled(ids, document_ids=numbers), each(ids, document_ids=numbers))
    loss.backward()


def test_16_bit_and_autocast() -> None:
    each, ids = model(**LLAMA, dtype=torch.float32), tokens(2, 7)
    wanted = each(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert (each(ids).float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    half = each.to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    assert (half(ids).float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    half.generate(ids, 3)


@pytest.mark.parametrize("positions", ["rope", "sinusoidal", "learned"])
def test_files_and_the_meta_device(positions: str) -> None:
    each, ids = model(positions=positions), tokens(2, 5)
    empty = dl.LanguageModel(**SMALL, positions=positions, device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(each.state_dict(), assign=True)
    assert empty.output.weight is empty.embedding.weight
    assert torch.equal(empty(ids), each(ids))
    filled = dl.LanguageModel(**SMALL, positions=positions, device="meta").to_empty(device="cpu")
    filled.reset_parameters()
    assert filled.output.weight is filled.embedding.weight
    assert filled(ids).isfinite().all()
    assert torch.equal(pickle.loads(pickle.dumps(each))(ids), each(ids))
    apart = model(tie_output=False)
    assert apart.output.weight is not apart.embedding.weight


@pytest.mark.parametrize("init", ["lipschitz", "glorot", "ds", "ds-released", "depth", "deepnorm"])
def test_grouped_matrices_are_drawn_by_their_own_sizes(init: str) -> None:
    each = dl.LanguageModel(7, 64, 8, 2, kv_heads=2, ffn="swiglu", connection="pre-norm", init=init)
    for index, layer in enumerate(each.decoder.layers):
        query, key, value = layer.self_attn.in_proj.weight.split(layer.self_attn.parts)
        assert (query.shape[0], key.shape[0], value.shape[0]) == (64, 16, 16)
        scale, glorot = {"ds": (index + 1) ** -0.5, "ds-released": (index + 1) ** -0.25}.get(init, 1.0), 6**0.5
        for part, rows, inside in ((query, 64, False), (key, 16, False), (value, 16, True)):
            bound = scale * glorot / (64 + rows) ** 0.5
            if init == "lipschitz":
                bound = 1 / 8
            elif init == "deepnorm" and inside:
                bound *= each.decoder.beta
            if init != "depth":
                assert 0.95 * bound < part.abs().max() <= bound
        gate, up = layer.linear1.weight.chunk(2)
        assert gate.shape == up.shape == (8 * -(-64 // 3), 64)
        bound = scale * glorot / (64 + gate.shape[0]) ** 0.5 * (each.decoder.beta if init == "deepnorm" else 1.0)
        bound = 1 / 8 if init == "lipschitz" else bound
        for part in (gate, up):
            assert init == "depth" or 0.95 * bound < part.abs().max() <= bound
    twin = dl.reference.LanguageModel(7, 64, 8, 2, kv_heads=2, init="glorot")
    key = twin.decoder.layers[0].self_attn.in_proj.weight[64:80]
    assert 0.95 * (6 / 80) ** 0.5 < key.abs().max() <= (6 / 80) ** 0.5


def test_other_connections_of_the_twin_and_a_users_own() -> None:
    with pytest.raises(ValueError, match="connection must be one of 'depth-lstm', 'pre-norm'; found 'dlcl'"):
        dl.reference.LanguageModel(**SMALL, connection="dlcl")
    blocks = functools.partial(dl.connections.AttentionResiduals, block_size=2, norm="layer")
    each = model(connection=blocks, norm="rms")  # what the user chose stays
    assert isinstance(each.decoder.connection.final_norm, nn.LayerNorm)
    joint = model(connection=functools.partial(dl.connections.DepthLSTM, norm="joint"), norm="rms")
    assert joint.decoder.connection.cells[0].norm_kind == "joint"
    assert isinstance(joint.decoder.connection.final_norm, nn.RMSNorm)


def test_tools_know_the_model() -> None:
    each, ids = model(), tokens(2, 6)
    probes = dl.probe_gradients(each, (ids,))
    assert len(probes["decoder"].gradients) == 2
    decays = dl.param_groups(each)
    assert sum(len(group["params"]) for group in decays) == len(list(each.parameters()))
    longer = each.decoder.like(3)
    assert len(longer.layers) == 3
    assert longer.layers[0].self_attn.kv_heads == 4
