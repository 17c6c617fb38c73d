"""Encoder, Decoder and Transformer: caches, masks, checkpointing, compilation, users' connections, files."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from connection_helpers import F64, FORMS, NAMES, SMALL, C, assert_close, batch, model, normal, randomise
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.connections import Connection


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_is_the_full_forward(form: str) -> None:
    decoder = randomise(dl.Decoder(C, 2, 2, batch_first=True, dropout=0.0, dtype=F64, connection=FORMS[form]))
    tgt, memory = normal(2, 5, C), normal(2, 4, C)
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    wanted = decoder(tgt, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
    caches = decoder.new_caches(memory, padding)
    steps = [decoder.step(tgt[:, t : t + 1], caches) for t in range(5)]
    assert_close(torch.cat(steps, 1), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_that_without(form: str, beams: int) -> None:
    translator, (src, _) = randomise(model(form)), batch()
    cached, scores = translator.generate(src, 6, beams, return_scores=True)
    tokens, wanted = translator.generate(src, 6, beams, use_cache=False, return_scores=True)
    assert torch.equal(cached, tokens)
    assert_close(scores, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form: str) -> None:
    translator, (src, tgt) = randomise(model(form)), batch()
    whole = translator(src, tgt)
    assert_close(translator(src[2:, :2], tgt[2:]), whole[2:])
    later = tgt.clone()
    later[:, 4] = 5  # causal: nothing before it may change
    assert torch.equal(translator(src, later)[:, :4], whole[:, :4])


def test_layouts_are_equal() -> None:
    first = randomise(dl.Encoder(C, 2, 2, dropout=0.0, batch_first=True, dtype=F64, connection="pre-norm"))
    second = dl.Encoder(C, 2, 2, dropout=0.0, dtype=F64, connection="pre-norm")
    second.load_state_dict(first.state_dict())
    src = normal(3, 4, C)
    assert_close(second(src.transpose(0, 1)).transpose(0, 1), first(src))
    assert_close(first(src[0]), first(src)[0])
    outputs = first.layer_outputs(src)
    assert len(outputs) == 3
    assert torch.equal(outputs[-1], first(src))


def gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # dropout's masks
    output = module(*inputs)
    torch.manual_seed(2)
    return torch.autograd.grad(output, list(module.parameters()), torch.randn_like(output), allow_unused=True)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_no_gradient(form: str) -> None:
    translator, (src, tgt) = model(form, dropout=0.2), batch()
    wanted = gradients(translator, src, tgt)
    translator.encoder.gradient_checkpointing = translator.decoder.gradient_checkpointing = True
    for found, each in zip(gradients(translator, src, tgt), wanted, strict=True):
        assert (found is None and each is None) or torch.equal(found, each)


@pytest.mark.parametrize("form", ["pre-norm", "dlcl", "denseformer", "attention-residuals"])
def test_history_is_recomputed_once_and_kept_once(form: str) -> None:
    """A layer runs twice, whatever the depth, and what is kept grows as the depth does, not as its square."""

    def kept(layers: int) -> tuple[int, list[int]]:
        encoder = dl.Encoder(C, 2, layers, dropout=0.0, dtype=F64, connection=FORMS[form])
        encoder.gradient_checkpointing = True
        calls, storages = [0] * layers, {}
        for index, layer in enumerate(encoder.layers):

            def count(*_: Any, index: int = index) -> None:
                calls[index] += 1

            layer.self_attn.register_forward_hook(count)
        parameters = {parameter.data_ptr() for parameter in encoder.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        src = normal(16, 1, C)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = encoder(src)
        (output * normal(16, 1, C)).sum().backward()
        return sum(storages.values()), calls

    small, calls = kept(3)
    large, more = kept(6)
    assert calls == [2] * 3
    assert more == [2] * 6
    assert large <= 2.2 * small


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Stacks share their code: without this each model would be one more recompilation of the first."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", [*NAMES, "dlcl, post", "attention-residuals, block"])
def test_compiled_without_a_break(form: str) -> None:
    encoder = randomise(dl.Encoder(C, 2, 2, dropout=0.0, dtype=F64, feed_forward=False, connection=FORMS[form]))
    src = normal(3, 2, C)
    assert_close(torch.compile(encoder, fullgraph=True, backend="eager")(src), encoder(src))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_kept_after_a_call(form: str) -> None:
    """A history that stayed on the module would be there in the next iteration."""
    encoder, outputs = dl.Encoder(C, 2, 2, dropout=0.0, dtype=F64, connection=FORMS[form]), []
    for layer in encoder.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    output = encoder(normal(3, 2, C))
    output.sum().backward()
    del output
    assert [each() for each in outputs] == [None, None]


@pytest.mark.parametrize("form", ["dlcl", "attention-residuals"])
def test_exported(form: str) -> None:
    encoder, src = randomise(dl.Encoder(C, 2, 2, dropout=0.0, dtype=F64, connection=FORMS[form])), normal(3, 2, C)
    exported = torch.export.export(encoder, (src,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    longer = normal(5, 2, C)
    assert_close(exported.module()(longer), encoder(longer))


class Halves(Connection):
    """A user's own: the running mean of the branches, pre-norm."""

    def __init__(self, d_model: int, num_branches: int) -> None:
        super().__init__(d_model, num_branches)
        self.norm = nn.LayerNorm(d_model)

    def read(self, state: tuple[Tensor, ...], i: int) -> Tensor:
        return self.norm(state[0])

    def write(self, state: tuple[Tensor, ...], y: Tensor, i: int) -> tuple[Tensor, ...]:
        return ((state[0] + y) / 2,)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_users_connection_is_trained_and_checkpointed(compiled: bool) -> None:
    sizes = {**SMALL, "num_encoder_layers": 1, "num_decoder_layers": 1, "dtype": torch.float32}
    translator, (src, tgt) = dl.Transformer(**sizes, connection=Halves), batch()
    translator.encoder.gradient_checkpointing = translator.decoder.gradient_checkpointing = True
    trained = torch.compile(translator, fullgraph=True, backend="aot_eager") if compiled else translator
    optimiser = torch.optim.AdamW(dl.param_groups(translator), lr=0.01)
    losses = []
    for _ in range(4):
        logits = trained(src, tgt[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert translator.generate(src, 4).shape[0] == 3


class Listed(Halves):
    def write(self, state: Any, y: Tensor, i: int) -> Any:
        return [state[0] + y]


class Numbered(Halves):
    def start(self, x: Tensor) -> Any:
        return x, 0


class Bare(Halves):
    def step(self, state: Any, y: Tensor, i: int) -> Any:
        return state[0] + y


class WrongStep(Halves):
    def step(self, state: Any, y: Tensor, i: int) -> Any:
        return [state[0] + y], y


@pytest.mark.parametrize(
    ("connection", "text"),
    [
        (Listed, r"Listed.write must return a state that is a tuple of tensors; found list"),
        (
            Numbered,
            r"Numbered.start must return a state that is a tuple of tensors; found a tuple of \['Tensor', 'int'\]",
        ),
        (Bare, r"Bare.step must return \(state, next input\)"),
        (WrongStep, r"WrongStep.step must return a state that is a tuple of tensors; found list"),
    ],
)
def test_a_state_that_is_no_tuple_of_tensors_is_told_at_once(connection: Any, text: str) -> None:
    encoder = dl.Encoder(C, 2, 1, connection=connection)
    with pytest.raises(TypeError, match=text):
        encoder(torch.randn(2, 1, C))


def test_what_makes_no_connection_is_told() -> None:
    with pytest.raises(TypeError, match=r"connection must be a name or a callable .* found an instance of PreNorm"):
        dl.Encoder(C, 2, 1, connection=dl.connections.PreNorm(C, 2))
    with pytest.raises(TypeError, match=r"connection must be a name or a callable .* found int"):
        dl.Encoder(C, 2, 1, connection=3)
    with pytest.raises(TypeError, match="connection must return a Connection; found Linear"):
        dl.Encoder(C, 2, 1, connection=nn.Linear)
    with pytest.raises(ValueError, match="feed_forward must be True or False where connection is a callable"):
        dl.Encoder(C, 2, 1, connection=lambda width, number: dl.connections.DepthLSTM(width, number))
    quiet = dl.Encoder(C, 2, 1, feed_forward=False, connection=lambda d, n: dl.connections.DepthLSTM(d, n))
    assert quiet.connection.num_branches == 1


def test_absorbed_networks_are_left_out_by_default() -> None:
    for name in NAMES:
        absorbs = dl.connections.get(name).absorbs_feed_forward
        assert absorbs == (name in ("depth-lstm", "depth-gru"))
        encoder, decoder = dl.Encoder(C, 2, 2, connection=name), dl.Decoder(C, 2, 2, connection=name)
        assert hasattr(encoder.layers[0], "linear1") == (not absorbs)
        assert encoder.connection.num_branches == (2 if absorbs else 4)
        assert decoder.connection.num_branches == (2 if absorbs else 6)
        assert hasattr(dl.Encoder(C, 2, 2, connection=name, feed_forward=True).layers[0], "linear1")
        assert dl.Encoder(C, 2, 2, connection=name, feed_forward=False).connection.num_branches == 2


def test_dropout_acts_on_branches_unless_the_connection_drops() -> None:
    assert dl.Encoder(C, 2, 1, dropout=0.3, connection="pre-norm").dropout == 0.3
    cell_only = dl.Encoder(C, 2, 1, dropout=0.3, connection="depth-lstm")
    assert (cell_only.dropout, cell_only.connection.cells[0].dropout) == (0.0, 0.3)
    own = dl.Encoder(C, 2, 1, dropout=0.3, connection=functools.partial(dl.connections.DepthLSTM, dropout=0.1))
    assert own.connection.cells[0].dropout == 0.1
    encoder = dl.Encoder(C, 2, 1, dropout=0.5, connection="pre-norm", feed_forward=False)
    with torch.no_grad():
        encoder.layers[0].self_attn.out_proj.weight.zero_()
        encoder.layers[0].self_attn.out_proj.bias.fill_(1.0)
    x = torch.zeros(50, 1, C)
    encoder.connection.final_norm = nn.Identity()
    assert set(encoder(x).unique().tolist()) == {0.0, 2.0}


def test_a_connection_is_told_what_it_has_arguments_for() -> None:
    options = {"layer_norm_eps": 1e-3, "bias": False, "activation": "relu", "dropout": 0.3}
    cell = dl.Encoder(C, 2, 1, connection="depth-lstm", **options).connection.cells[0]
    assert (cell.eps, cell.gates.bias, cell.activation, cell.dropout) == (1e-3, None, "relu", 0.3)
    gru = dl.Encoder(C, 2, 1, connection="depth-gru", **options).connection.cells[0]
    assert (gru.eps, gru.input_proj.bias) == (1e-3, None)
    for name in NAMES:
        connection = dl.Encoder(C, 2, 1, connection=name, **options).connection
        norms = [module for module in connection.modules() if isinstance(module, nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {1e-3}, name
        assert getattr(connection, "eps", 1e-3) == 1e-3, name


FILES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"hidden": "ffn", "bias": False}, {"connection": functools.partial(dl.connections.DepthLSTM, hidden="ffn")}),
    (
        {"share_cell": True, "init_cell": "learned", "positions": "learned", "tie_output": False},
        {"connection": functools.partial(dl.connections.DepthLSTM, share_cell=True, init_cell="learned")},
    ),
    ({"merge": "cells", "sublayer": True}, {"decoder_attention": "separate", "feed_forward": True}),
    ({"sublayer": True, "norm": "joint"}, {"feed_forward": True, "connection": "joint"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("theirs", "ours"), FILES, ids=str)
def test_files_of_the_depth_lstm_transformer_give_the_same_bits(theirs: dict, ours: dict, dtype: torch.dtype) -> None:
    sizes = {**SMALL, "dtype": dtype}
    old = randomise(dl.DepthLSTMTransformer(**sizes, **theirs)).eval()
    shared = {name: theirs[name] for name in ("bias", "positions", "tie_output") if name in theirs}
    if ours.get("connection") == "joint":
        ours = {**ours, "connection": functools.partial(dl.connections.DepthLSTM, norm="joint")}
    new = dl.Transformer(**sizes, **shared, **ours).eval()
    file = old.state_dict()
    keys = set(file)
    new.load_state_dict(file)
    assert set(file) == keys  # the caller's dictionary is its own
    src, tgt = batch()
    assert torch.equal(new(src, tgt), old(src, tgt))
    for beams in (1, 2):
        assert torch.equal(new.generate(src, 6, beams), old.generate(src, 6, beams))
    new.load_state_dict(new.state_dict())  # and its own files still load


def test_devices_and_types_of_the_connection() -> None:
    encoder = dl.Encoder(C, 2, 2, connection="attention-residuals", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder(torch.randn(3, 1, C, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for name in NAMES:
        empty = dl.Transformer(**{**SMALL, "dtype": torch.float32}, connection=name, device="meta")
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.to_empty(device="cpu").reset_parameters()
        assert empty(*batch()).isfinite().all(), name


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    translator, (src, tgt) = model(form, dtype=torch.float32), batch()
    wanted = translator(src, tgt)
    with torch.autocast("cpu", torch.bfloat16):
        logits = translator(src, tgt)
    logits.float().square().mean().backward()
    assert (logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max().clamp(min=1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in translator.parameters())


def test_wrong_decoder_arguments() -> None:
    decoder = dl.Decoder(C, 2, 2, batch_first=True, connection="pre-norm")
    tgt, memory = torch.randn(2, 3, C), torch.randn(2, 4, C)
    with pytest.raises(ValueError, match="caches must be a list of 2, one a layer"):
        decoder(tgt[:, :1], memory, caches=[])
    with pytest.raises(ValueError, match="tgt must hold one position with a cache; found 3"):
        decoder(tgt, memory, caches=decoder.new_caches(memory))
    with pytest.raises(ValueError, match="memory must be batched as tgt"):
        decoder(tgt, memory[:1])
    with pytest.raises(ValueError, match="memory must be a tensor, or a tuple of 2 with a memory a layer; found"):
        decoder(tgt, (memory,))
    with pytest.raises(ValueError, match="decoder_attention must be one of"):
        dl.Decoder(C, 2, 2, decoder_attention="crossed")
