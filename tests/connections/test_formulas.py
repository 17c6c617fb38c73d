"""Each connection against its formula written out, or against torch's own modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from connection_helpers import F64, C, assert_close, branches, make, normal, randomise, run
from torch import Tensor, nn

import depthlstm_fast as dl

Function = Callable[[Tensor], Tensor]
FORMULAS: dict[str, Callable[..., Tensor]] = {}


def formula(*forms: str) -> Callable:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FORMULAS.update(dict.fromkeys(forms, function))
        return function

    return add


@formula("pre-norm", "pre-norm, rms")
def pre_norm(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for norm, branch in zip(connection.read_norms, functions, strict=True):
        x = x + branch(norm(x))
    return connection.final_norm(x)


@formula("post-norm")
def post_norm(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for norm, branch in zip(connection.sum_norms, functions, strict=True):
        x = norm(x + branch(x))
    return x


@formula("sandwich")
def sandwich(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for before, after, branch in zip(connection.read_norms, connection.branch_norms, functions, strict=True):
        x = x + after(branch(before(x)))
    return connection.final_norm(x)


@formula("deepnorm")
def deepnorm(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    alpha = len(functions) ** 0.25
    for norm, branch in zip(connection.sum_norms, functions, strict=True):
        x = norm(alpha * x + branch(x))
    return x


@formula("keel")
def keel(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for inner, outer, branch in zip(connection.read_norms, connection.sum_norms, functions, strict=True):
        x = outer(len(functions) * x + branch(inner(x)))
    return x


@formula("rezero")
def rezero(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for i, branch in enumerate(functions):
        x = x + connection.alpha[i] * branch(connection.read_norms[i](x))
    return connection.final_norm(x)


@formula("layerscale")
def layerscale(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for i, branch in enumerate(functions):
        x = x + torch.diag(connection.gamma[i]).matmul(branch(connection.read_norms[i](x)).unsqueeze(-1)).squeeze(-1)
    return connection.final_norm(x)


@formula("siamese", "siamese, rms")
def siamese(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    y = x
    for i, branch in enumerate(functions):
        o = branch(connection.read_norms[i](x + connection.y_norms[i](y)))
        x = connection.x_norms[i](x + o / math.sqrt(2 * (i // 2 + 1)))
        y = y + o
    return x + connection.y_norms[-1](y)


@formula("depth-lstm", "depth-lstm, ffn")
def depth_lstm(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    h, c = x, torch.zeros_like(x)
    if connection.initial_cell is not None:
        c = c + connection.initial_cell
    for cell, branch in zip(connection.cells, functions, strict=True):
        options = {"hidden": cell.hidden, "dtype": F64}
        twin = dl.reference.DepthLSTMCell(C, C, **options)
        twin.load_state_dict(cell.state_dict())
        h, c = twin(branch(h), (h, c))
    return connection.final_norm(h)


@formula("depth-gru")
def depth_gru(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for cell, branch in zip(connection.cells, functions, strict=True):
        twin = nn.GRUCell(C, C, dtype=F64)
        names = {"weight_ih": "input_proj.weight", "bias_ih": "input_proj.bias"}
        names |= {"weight_hh": "state_proj.weight", "bias_hh": "state_proj.bias"}
        twin.load_state_dict({name: cell.state_dict()[own] for name, own in names.items()})
        x = twin(branch(x).flatten(0, -2), x.flatten(0, -2)).view_as(x)
    return connection.final_norm(x)


@formula("depth-gru, before")
def gtrxl(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    for cell, branch in zip(connection.cells, functions, strict=True):
        y = branch(x)
        w_r, w_z, w_n = cell.input_proj.weight.chunk(3)
        b_r, b_z, b_n = cell.input_proj.bias.chunk(3)
        u_r, u_z = cell.state_proj.weight.chunk(2)
        c_r, c_z = cell.state_proj.bias.chunk(2)
        gates = (y @ w_r.T + b_r + x @ u_r.T + c_r, y @ w_z.T + b_z + x @ u_z.T + c_z, y @ w_n.T + b_n)
        normed = [
            nn.functional.layer_norm(gate, (C,), cell.norm.weight[k], cell.norm.bias[k], 1e-6)
            for k, gate in enumerate(gates)
        ]
        r, z = torch.sigmoid(normed[0]), torch.sigmoid(normed[1])
        x = (1 - z) * torch.tanh(normed[2] + (r * x) @ cell.reset_weight.T) + z * x
    return connection.final_norm(x)


@formula("dlcl")
def dlcl(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    w, history = connection.weights, [x]
    for layer in range(len(functions) // 2):
        y = torch.einsum("k,k...->...", w[layer, : layer + 1], torch.stack(history))
        for i in (2 * layer, 2 * layer + 1):
            y = y + functions[i](connection.branch_norms[i](y))
        history.append(connection.history_norms[layer](y))
    return connection.final_norm(torch.einsum("k,k...->...", w[-1], torch.stack(history)))


@formula("dlcl, post")
def dlcl_post(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    w, history = connection.weights, [x]
    for layer in range(len(functions) // 2):
        y = torch.einsum("k,k...->...", w[layer, : layer + 1], torch.stack(history))
        y = y if layer == 0 else connection.history_norms[layer - 1](y)
        for i in (2 * layer, 2 * layer + 1):
            y = connection.branch_norms[i](y + functions[i](y))
        history.append(y)
    return connection.history_norms[-1](torch.einsum("k,k...->...", w[-1], torch.stack(history)))


@formula("denseformer", "denseformer, dilation 3, period 2")
def denseformer(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    outputs, dilation, period = [x], connection.dilation, connection.period
    for block in range(1, len(functions) // 2 + 1):
        for i in (2 * block - 2, 2 * block - 1):
            x = x + functions[i](connection.read_norms[i](x))
        outputs.append(x)
        if block % period == 0:
            row = connection.weights[block // period - 1]
            x = sum(row[j] * outputs[j] for j in range(block + 1) if (block - j) % dilation == 0)
    return connection.final_norm(x)


@formula("attention-residuals", "attention-residuals, rms", "attention-residuals, block")
def attention_residuals(connection: nn.Module, x: Tensor, functions: list[Function]) -> Tensor:
    size, outputs = connection.block_size or 1, []

    def attend(row: int) -> Tensor:
        sources = [x] + [sum(outputs[k : k + size]) for k in range(0, len(outputs), size)]
        stacked = torch.stack(sources)
        keys = nn.functional.rms_norm(stacked, (C,), connection.key_weights[row], 1e-6)
        shares = torch.einsum("c,l...c->l...", connection.queries[row], keys).softmax(0)
        return (shares[..., None] * stacked).sum(0)

    for i, branch in enumerate(functions):
        outputs.append(branch(connection.read_norms[i](x if i == 0 else attend(i - 1))))
    return connection.final_norm(attend(len(functions) - 1))


@pytest.mark.parametrize("fused", [True, False], ids=["step", "write-read"])
@pytest.mark.parametrize("form", FORMULAS)
def test_the_connection_is_its_formula(form: str, fused: bool) -> None:
    connection, x, functions = randomise(make(form, 10, per_layer=2)), normal(2, 3, C), branches(10)
    found, _ = run(connection, x, functions, fused)
    assert_close(found, FORMULAS[form](connection, x, functions))


def load_torch_layer(stack: dl.Encoder, layer: nn.TransformerEncoderLayer, index: int, norms: nn.ModuleList) -> None:
    """The weights of torch's encoder layer in ours."""
    ours, attention = stack.layers[index], layer.self_attn
    ours.self_attn.in_proj.load_state_dict({"weight": attention.in_proj_weight, "bias": attention.in_proj_bias})
    for own, other in ((ours.self_attn.out_proj, attention.out_proj), (ours.linear1, layer.linear1)):
        own.load_state_dict(other.state_dict())
    ours.linear2.load_state_dict(layer.linear2.state_dict())
    norms[2 * index].load_state_dict(layer.norm1.state_dict())
    norms[2 * index + 1].load_state_dict(layer.norm2.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_are_torchs(norm_first: bool) -> None:
    shape = {"dim_feedforward": 20, "dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-6, "dtype": F64}
    layer = nn.TransformerEncoderLayer(C, 2, batch_first=True, norm_first=norm_first, **shape)
    final = nn.LayerNorm(C, 1e-6, dtype=F64) if norm_first else None
    theirs = randomise(nn.TransformerEncoder(layer, 3, final, enable_nested_tensor=False))
    ours = dl.Encoder(C, 2, 3, batch_first=True, connection="pre-norm" if norm_first else "post-norm", **shape)
    norms = ours.connection.read_norms if norm_first else ours.connection.sum_norms
    for index, each in enumerate(theirs.layers):
        load_torch_layer(ours, each, index, norms)
    if final is not None:
        ours.connection.final_norm.load_state_dict(theirs.norm.state_dict())
    src, padding = normal(2, 5, C), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = theirs(src, mask=mask, src_key_padding_mask=padding)
    assert_close(ours(src, mask=mask, src_key_padding_mask=padding), wanted)


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoders_are_torchs(norm_first: bool) -> None:
    shape = {"dim_feedforward": 20, "dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-6, "dtype": F64}
    theirs = randomise(nn.TransformerDecoderLayer(C, 2, batch_first=True, norm_first=norm_first, **shape))
    ours = dl.Decoder(C, 2, 1, batch_first=True, connection="pre-norm" if norm_first else "post-norm", **shape)
    layer, other = ours.layers[0], theirs.multihead_attn
    layer.self_attn.in_proj.load_state_dict(
        {"weight": theirs.self_attn.in_proj_weight, "bias": theirs.self_attn.in_proj_bias}
    )
    layer.self_attn.out_proj.load_state_dict(theirs.self_attn.out_proj.state_dict())
    layer.cross_attn.q_proj.load_state_dict({"weight": other.in_proj_weight[:C], "bias": other.in_proj_bias[:C]})
    layer.cross_attn.kv_proj.load_state_dict({"weight": other.in_proj_weight[C:], "bias": other.in_proj_bias[C:]})
    layer.cross_attn.out_proj.load_state_dict(other.out_proj.state_dict())
    layer.linear1.load_state_dict(theirs.linear1.state_dict())
    layer.linear2.load_state_dict(theirs.linear2.state_dict())
    norms = ours.connection.read_norms if norm_first else ours.connection.sum_norms
    for own, norm in zip(norms, (theirs.norm1, theirs.norm2, theirs.norm3), strict=True):
        own.load_state_dict(norm.state_dict())
    tgt, memory = normal(2, 5, C), normal(2, 4, C)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = theirs(tgt, memory, tgt_mask=causal)
    if norm_first:
        wanted = nn.functional.layer_norm(wanted, (C,), eps=1e-6)
    assert_close(ours(tgt, memory, tgt_is_causal=True), wanted)


def test_an_encoder_is_the_depth_wise_lstms_own() -> None:
    theirs = dl.DepthLSTMEncoder(
        dl.DepthLSTMEncoderLayer(C, 2, batch_first=True, dropout=0.0, dtype=F64), 3, nn.LayerNorm(C, 1e-6, dtype=F64)
    )
    ours = dl.Encoder(C, 2, 3, batch_first=True, dropout=0.0, dtype=F64)
    ours.load_state_dict(randomise(theirs).state_dict())
    src = normal(2, 5, C)
    assert torch.equal(ours(src), theirs(src))
