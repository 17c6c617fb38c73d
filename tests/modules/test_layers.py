"""Layers: the fused ones against the reference ones, masks against torch's attention, layouts, errors."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from layer_helpers import BATCH, HEADS, LENGTH, MERGES, SOURCE, D, assert_same, build, normal, pair
from torch import Tensor, nn

import depthlstm_fast as dl


def results(layer: nn.Module, tensors: list[Tensor], cotangents: list[Tensor], **masks: Any) -> list[Tensor]:
    *inputs, state = tensors
    outputs = layer(*inputs, state, **masks)
    return [*outputs, *torch.autograd.grad(outputs, [*tensors, *layer.parameters()], cotangents)]


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": h, "norm": n, "sublayer": s, "bias": b}
        for h, n, s, b in product(("linear", "ffn"), ("gate", "joint"), (False, True), (True, False))
    ],
    ids=str,
)
def test_fused_encoder_layer(options: dict) -> None:
    reference, fused = pair("Encoder", **options)
    tensors = [normal(BATCH, LENGTH, D), normal(BATCH, LENGTH, D)]
    cotangents = [torch.randn_like(tensors[0]) for _ in range(2)]
    padding = torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2])
    for masks in ({}, {"src_key_padding_mask": padding}, {"is_causal": True}):
        assert_same(results(fused, tensors, cotangents, **masks), results(reference, tensors, cotangents, **masks))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "options",
    [{"hidden": h, "sublayer": s, "bias": b} for h, s, b in product(("linear", "ffn"), (False, True), (True, False))],
    ids=str,
)
def test_fused_decoder_layer(merge: str, options: dict) -> None:
    reference, fused = pair("Decoder", merge=merge, **options)
    tensors = [normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D), normal(BATCH, LENGTH, D)]
    cotangents = [torch.randn_like(tensors[0]) for _ in range(2)]
    padding = torch.tensor([[False] * SOURCE, [False] * 2 + [True] * 2])
    masks = {"tgt_is_causal": True, "memory_key_padding_mask": padding}
    assert_same(results(fused, tensors, cotangents, **masks), results(reference, tensors, cotangents, **masks))


@pytest.mark.parametrize(
    ("kind", "options"), [("Encoder", {}), *(("Decoder", {"merge": merge}) for merge in MERGES)], ids=str
)
def test_dropout_is_the_same_under_the_same_seed(kind: str, options: dict) -> None:
    reference, fused = pair(kind, dropout=0.3, sublayer=True, **options)
    tensors = [normal(BATCH, LENGTH, D) for _ in range(2 if kind == "Encoder" else 3)]
    cotangents = [torch.randn_like(tensors[0]) for _ in range(2)]
    found = []
    for layer in (fused, reference):
        torch.manual_seed(7)
        found.append(results(layer, tensors, cotangents))
    assert_same(*found)


def test_equations_of_the_decoder() -> None:
    tgt, memory, state = normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D), normal(BATCH, LENGTH, D)
    for module in (dl, dl.reference):
        for merge in MERGES:
            layer = build(module, "Decoder", merge=merge)
            s = layer.self_attn(tgt, None, True)
            if merge == "cells":
                h, c = layer.cell(s, (tgt, state))
                wanted = layer.cross_cell(layer.cross_attn(h, memory), (h, c))
            else:
                m = layer.cross_attn(s, memory)
                wanted = layer.cell(s + m if merge == "add" else torch.cat((s, m), -1), (tgt, state))
            assert_same(layer(tgt, memory, state, tgt_is_causal=True), wanted)


@pytest.mark.parametrize("merge", MERGES)
def test_reference_decoder_gradients_against_finite_differences(merge: str) -> None:
    layer = dl.reference.DepthLSTMDecoderLayer(
        2, 1, 3, 0.0, batch_first=True, hidden="ffn", merge=merge, dtype=torch.float64
    )
    names = [name for name, _ in layer.named_parameters()]

    def run(tgt: Tensor, memory: Tensor, state: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (tgt, memory, state), {"tgt_is_causal": True}
        )

    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(
        run, (normal(1, 3, 2), normal(1, 2, 2), normal(1, 3, 2), *parameters), fast_mode=True
    )


def torch_attention(attention: nn.Module) -> nn.MultiheadAttention:
    """Return torch's own attention with the weights of this package's."""
    twin = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64)
    parts = [attention.in_proj] if hasattr(attention, "in_proj") else [attention.q_proj, attention.kv_proj]
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        twin.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        twin.out_proj.load_state_dict(attention.out_proj.state_dict())
    return twin


def random_masks(keys: int) -> list[tuple[Tensor | None, Tensor | None]]:
    blocked = torch.rand(LENGTH, keys) < 0.4
    blocked[:, 0] = False
    heads = torch.rand(BATCH * HEADS, LENGTH, keys) < 0.4
    heads[..., 0] = False
    padding = torch.tensor([[False] * keys, [False] * (keys - 2) + [True] * 2])
    attention: list[Tensor | None] = [
        None,
        blocked,
        torch.randn(LENGTH, keys, dtype=torch.float64),
        heads,
        torch.randn(heads.shape, dtype=torch.float64),
    ]
    return list(product(attention, [None, padding, torch.randn(BATCH, keys, dtype=torch.float64)]))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("cross", [False, True])
def test_masks_as_in_torch(cross: bool) -> None:
    reference = dl.reference
    attention = (reference.CrossAttention if cross else reference.SelfAttention)(D, HEADS, dtype=torch.float64)
    nn.init.normal_(attention.out_proj.bias)
    twin = torch_attention(attention)
    x, memory = normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D)
    keys = memory if cross else x
    for attention_mask, padding in random_masks(keys.shape[1]):
        sizes = (BATCH, HEADS, LENGTH, keys.shape[1])
        mask, causal = reference.attention_mask(attention_mask, padding, False, sizes=sizes, device=x.device)
        found = attention(x, memory, mask, causal) if cross else attention(x, mask, causal)
        wanted, _ = twin(x, keys, keys, key_padding_mask=padding, attn_mask=attention_mask, need_weights=False)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_causal_hint() -> None:
    layer = build(dl.reference, "Encoder")
    src, state = normal(BATCH, LENGTH, D), normal(BATCH, LENGTH, D)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2])
    wanted = layer(src, state, causal)
    assert_same(layer(src, state, causal, is_causal=True), wanted)
    assert_same(layer(src, state, is_causal=True), wanted)
    assert_same(layer(src, state, nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)), wanted)
    assert_same(layer(src, state, None, padding, True), layer(src, state, causal, padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fully_masked_rows_are_finite(dtype: torch.dtype) -> None:
    layer = build(dl, "Encoder", dtype=dtype)
    src = torch.randn(BATCH, LENGTH, D, dtype=dtype, requires_grad=True)
    padding = torch.tensor([[True] * LENGTH, [False] * LENGTH])
    for mask in (padding, torch.zeros(BATCH, LENGTH, dtype=dtype).masked_fill_(padding, -torch.inf)):
        h, c = layer(src, None, None, mask)
        gradients = torch.autograd.grad((h, c), [src, *layer.parameters()], [torch.randn_like(h), torch.randn_like(c)])
        assert all(t.isfinite().all() for t in (h, c, *gradients))
    zeros = layer.self_attn.out_proj.bias.expand(1, LENGTH, D)
    torch.testing.assert_close(h[:1], layer.cell(zeros, (src[:1], torch.zeros_like(src[:1])))[0])


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_layouts(module: Any) -> None:
    first = build(module, "Decoder")
    second = build(module, "Decoder", batch_first=False)
    second.load_state_dict(first.state_dict())
    tgt, memory, state = normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D), normal(BATCH, LENGTH, D)
    masks = {
        "tgt_key_padding_mask": torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2]),
        "memory_mask": torch.randn(LENGTH, SOURCE, dtype=torch.float64),
    }
    wanted = first(tgt, memory, state, **masks)
    swapped = second(tgt.transpose(0, 1), memory.transpose(0, 1), state.transpose(0, 1), **masks)
    assert_same([t.transpose(0, 1) for t in swapped], wanted)
    masks["tgt_key_padding_mask"] = masks["tgt_key_padding_mask"][1]
    for layer in (first, second):
        assert_same(layer(tgt[1], memory[1], state[1], **masks), [t[1] for t in wanted])


def test_heads_are_split_and_merged_without_copies() -> None:
    attention = dl.reference.SelfAttention(D, HEADS)
    projected = torch.randn(BATCH, LENGTH, 3 * D)
    assert all(
        part.data_ptr() == projected[..., i * D :].data_ptr() for i, part in enumerate(attention._split(projected, 3))
    )
    query, keys, values = attention._split(projected, 3)
    storage = []
    original = nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        output = original(*args, **kwargs)
        storage.append(output.data_ptr())
        return output

    padding = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        for mask, causal in ((None, False), (None, True), (padding, False)):
            merged = attention._attend(query, keys, values, mask, causal)
            assert merged.data_ptr() == storage[-1]
            assert merged.is_contiguous()


def test_matrices_have_the_size_of_a_residual_layer() -> None:
    def matrices(layer: nn.Module) -> int:
        return sum(p.numel() for m in layer.modules() if isinstance(m, nn.Linear) for p in m.parameters())

    assert matrices(build(dl, "Encoder", bias=False)) == 12 * D * D
    assert matrices(build(dl, "Decoder", bias=False)) == 16 * D * D


@pytest.mark.parametrize("init", ["lipschitz", "glorot"])
@pytest.mark.parametrize("hidden", ["linear", "ffn"])
def test_initialisation(hidden: str, init: str) -> None:
    """Check the bound of every matrix, also of those stacked in one weight; biases are zero."""
    stacked = {"in_proj": 3, "kv_proj": 2, "gates": 4 if hidden == "linear" else 3}
    for module in (dl, dl.reference):
        layer = build(
            module, "Decoder", d_model=60, merge="cells", sublayer=True, hidden=hidden, init=init, dim_feedforward=100
        )
        linears = {name: child for name, child in layer.named_modules() if isinstance(child, nn.Linear)}
        assert len(linears) == (10 if hidden == "linear" else 16)
        for name, linear in linears.items():
            rows, columns = linear.weight.shape
            rows //= stacked.get(name.split(".")[-1], 1)
            bound = columns**-0.5 if init == "lipschitz" else (6 / (rows + columns)) ** 0.5
            assert 0.98 * bound < linear.weight.abs().max() <= bound, name
            assert not linear.bias.any(), name


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_copies_and_reset(kind: str) -> None:
    for module in (dl, dl.reference):
        layer = build(module, kind, sublayer=True)
        assert repr(pickle.loads(pickle.dumps(layer))) == repr(copy.deepcopy(layer)) == repr(layer)
        before = copy.deepcopy(layer.state_dict())
        layer.reset_parameters()
        changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.endswith("weight") and "norm" not in name}


class Doubled(nn.Linear):
    """A subclass with the same parameters and another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "lora", "subclass"])
def test_replaced_output_projection_is_called(how: str) -> None:
    reference, fused = pair("Decoder")
    for layer in (reference, fused):
        if how == "hook":
            layer.cross_attn.out_proj.register_forward_hook(lambda module, args, output: 2 * output)
        elif how == "pre-hook":
            layer.cross_attn.out_proj.register_forward_pre_hook(lambda module, args: 2 * args[0])
        elif how == "subclass":
            layer.cross_attn.out_proj.__class__ = Doubled
        else:
            layer.cross_attn.out_proj = nn.Sequential(layer.cross_attn.out_proj, nn.Tanh())
    tgt, memory = normal(BATCH, LENGTH, D), normal(BATCH, SOURCE, D)
    assert_same(fused(tgt, memory), reference(tgt, memory))


def calls(function: Any) -> dict[str, int]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("bias", [True, False])
def test_passes_of_a_fused_decoder_layer(merge: str, bias: bool) -> None:
    """Check for no concatenation and no copy; the only addition is s + bias, which is the accumulator's copy of s."""
    layer = build(dl, "Decoder", merge=merge, bias=bias, dtype=torch.float32)
    inputs = [torch.randn(BATCH, LENGTH, D, requires_grad=True) for _ in range(3)]
    outputs = layer(*inputs, tgt_is_causal=True)
    cotangents = [torch.randn(BATCH, LENGTH, D) for _ in range(2)]
    torch.autograd.backward(outputs, cotangents)
    forward = calls(lambda: layer(*inputs, tgt_is_causal=True))
    if "depthlstm_fast::gates_forward" not in forward:
        pytest.skip("the extension is not in use")
    assert forward["depthlstm_fast::gates_forward"] == (2 if merge == "cells" else 1)
    assert forward.get("aten::add", 0) == (1 if merge == "add" and bias else 0)
    outputs = layer(*inputs, tgt_is_causal=True)
    backward = calls(lambda: torch.autograd.backward(outputs, cotangents))
    for unwanted in ("aten::cat", "aten::clone", "aten::contiguous", "aten::slice_backward", "aten::new_zeros"):
        assert unwanted not in forward
        # the gradients of queries, keys and values are concatenated
        assert unwanted not in backward or unwanted == "aten::cat"


def test_zero_rows() -> None:
    for kind, count in (("Encoder", 2), ("Decoder", 3)):
        layer = build(dl, kind)
        h, c = layer(*(normal(0, LENGTH, D) for _ in range(count)))
        assert h.shape == c.shape == (0, LENGTH, D)


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_constructor_errors(module: Any) -> None:
    for options, text in (
        ({"nhead": 5}, "nhead must divide d_model, 12; found 5"),
        ({"nhead": 0}, "nhead must be at least 1; found 0"),
        ({"d_model": 0}, "d_model must be at least 1; found 0"),
        ({"dim_feedforward": 0}, "dim_feedforward must be at least 1; found 0"),
        ({"dropout": 1.5}, r"must be in \[0, 1\); found 1.5"),
        ({"hidden": "x"}, "hidden must be one of"),
        ({"merge": "sum"}, "merge must be one of 'add', 'concat', 'cells'; found 'sum'"),
    ):
        with pytest.raises(ValueError, match=text):
            module.DepthLSTMDecoderLayer(**{"d_model": D, "nhead": HEADS, **options})
    with pytest.raises(ValueError, match="num_layers must be at least 1; found 0"):
        module.DepthLSTMEncoder(build(module, "Encoder"), 0)
    with pytest.raises(ValueError, match="init_cell must be one of 'zeros', 'learned'; found 'ones'"):
        module.DepthLSTMEncoder(build(module, "Encoder"), 1, init_cell="ones")


@pytest.mark.parametrize("module", [dl, dl.reference])
def test_forward_errors(module: Any) -> None:
    layer = build(module, "Decoder")
    good: dict[str, Any] = {"tgt": normal(BATCH, LENGTH, D), "memory": normal(BATCH, SOURCE, D)}
    for options, error, text in (
        (
            {"tgt": normal(BATCH, LENGTH, D + 1)},
            ValueError,
            r"tgt must have shape \(batch, length, 12\) or \(length, 12\); found \(2, 5, 13\)",
        ),
        ({"tgt": torch.zeros(BATCH, LENGTH, D, dtype=torch.int64)}, TypeError, "tgt must be float32"),
        ({"memory": normal(3, SOURCE, D)}, ValueError, "memory must be batched as tgt"),
        ({"memory": normal(SOURCE, D)}, ValueError, "memory must be batched as tgt"),
        ({"state": normal(BATCH, 3, D)}, ValueError, r"state must have shape \(2, 5, 12\); found \(2, 3, 12\)"),
        (
            {"tgt_mask": torch.zeros(3, 3)},
            ValueError,
            r"tgt_mask must have shape \(5, 5\) or \(6, 5, 5\); found \(3, 3\)",
        ),
        (
            {"tgt_mask": torch.zeros(5, 5, dtype=torch.int64)},
            TypeError,
            "tgt_mask must be bool or floating point; found torch.int64",
        ),
        ({"memory_mask": [1]}, TypeError, "memory_mask must be a torch.Tensor; found list"),
        (
            {"tgt_key_padding_mask": torch.zeros(2, 4)},
            ValueError,
            r"tgt_key_padding_mask must have shape \(2, 5\); found \(2, 4\)",
        ),
        (
            {"memory_key_padding_mask": torch.zeros(4)},
            ValueError,
            r"memory_key_padding_mask must have shape \(2, 4\); found \(4,\)",
        ),
    ):
        with pytest.raises(error, match=text):
            layer(**{**good, **options})


def test_compiled_without_graph_breaks() -> None:
    for kind, count in (("Encoder", 2), ("Decoder", 3)):
        layer = build(dl, kind, dtype=torch.float32)
        inputs = [torch.randn(BATCH, LENGTH, D) for _ in range(count)]
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_same(compiled(*inputs), layer(*inputs), 1e-5)
