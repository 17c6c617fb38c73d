"""What holds for every connection: its state, what it leaves alone, its initial values, gradients and weight decay."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
import torch
from connection_helpers import F64, FORMS, NAMES, C, batch, branches, make, model, normal, randomise, run
from helpers import DEVICE, needs_cpp, needs_triton
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.connections import Connection, PreNorm


@pytest.mark.parametrize("form", FORMS)
def test_states_are_tuples_of_tensors_that_nobody_changes(form: str) -> None:
    """In-place adds into a history tensor would change what later branches read."""
    connection, functions = randomise(make(form, 6, per_layer=2)), branches(6)
    x = normal(2, 3, C)
    state, seen = connection.start(x), []
    u = connection.read(state, 0)
    for i, function in enumerate(functions):
        assert isinstance(state, tuple)
        assert all(isinstance(each, Tensor) for each in state)
        y = function(u)
        seen += [(each, each.clone()) for each in (*state, u, y)]
        if i + 1 < len(functions):
            state, u = connection.step(state, y, i)
        else:
            state = connection.write(state, y, i)
    connection.finish(state)
    for tensor, before in seen:
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_independent(form: str) -> None:
    """One token never sees another: that is why incremental decoding needs no state over depth."""
    connection, functions, x = randomise(make(form, 6, per_layer=2)), branches(6), normal(4, C)
    whole, _ = run(connection, x, functions)
    other = x.clone()
    other[2] = normal(C)
    changed, _ = run(connection, other, functions)
    assert torch.equal(whole[[0, 1, 3]], changed[[0, 1, 3]])
    assert not torch.equal(whole[2], changed[2])


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    connection, functions, x = randomise(make(form, 4, per_layer=2)), branches(4), normal(2, C).requires_grad_()
    parameters = [parameter for parameter in connection.parameters() if parameter.numel() < 200]

    def output(x: Tensor, *rest: Tensor) -> Tensor:
        return run(connection, x, functions)[0]

    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_is_used_and_finite_gradients_reach_it_through_24_layers(form: str) -> None:
    encoder = dl.Encoder(C, 2, 24, dropout=0.0, connection=FORMS[form], dtype=F64)
    output = encoder(normal(3, 2, C))
    (output * normal(3, 2, C)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert encoder.layers[0].self_attn.out_proj.weight.grad.abs().max() > 0 or "rezero" in form


@pytest.mark.parametrize("form", FORMS)
def test_only_what_says_so_is_pre_norm_at_initialisation(form: str) -> None:
    connection, functions, x = make(form, 6, per_layer=2), branches(6), torch.randn(4, C, dtype=F64)
    pre_norm = make("pre-norm, rms" if "rms" in form else "pre-norm", 6)
    with dl.use_backend("reference"):
        found, wanted = run(connection, x, functions), run(pre_norm, x, functions)
    same = torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))
    assert same == connection.is_identity_at_init, form


FUSED = [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("width", [C, 96])
@pytest.mark.parametrize("per_layer", [1, 2])
@pytest.mark.parametrize("form", [form for form in FORMS if "denseformer" in form] + ["denseformer, rms", "dilation 2"])
def test_what_says_so_is_pre_norm_in_the_kernels_too(form: str, per_layer: int, width: int, backend: str) -> None:
    """Bit for bit, outputs and inputs of every branch."""
    more: dict[str, Any] = {"denseformer, rms": {"norm": "rms"}, "dilation 2": {"dilation": 2}}
    factory = functools.partial(dl.connections.DenseFormer, **more[form]) if form in more else FORMS[form]
    factory = dl.connections.get(factory) if isinstance(factory, str) else factory
    device = DEVICE if backend == "triton" else "cpu"
    connection = factory(width, 6, branches_per_layer=per_layer).to(device)
    assert connection.is_identity_at_init
    pre_norm = PreNorm(width, 6, norm=connection.norm).to(device)
    matrices = [torch.randn(width, width, device=device) / width**0.5 for _ in range(6)]
    functions = [lambda u, matrix=matrix: torch.tanh(u @ matrix) for matrix in matrices]
    x = torch.randn(5, width, device=device)
    with dl.use_backend(backend):
        found, wanted = run(connection, x, functions), run(pre_norm, x, functions)
        assert dl.last_backend() == backend
    assert torch.equal(found[0], wanted[0])
    assert all(map(torch.equal, found[1], wanted[1]))


def test_pre_norm_and_denseformer_say_so() -> None:
    assert {name for name in NAMES if dl.connections.get(name).is_identity_at_init} == {"pre-norm", "denseformer"}


def test_rezero_passes_its_input_on_at_initialisation() -> None:
    connection, x = make("rezero", 6), normal(4, C)
    found, _ = run(connection, x, branches(6))
    assert torch.equal(found, connection.final_norm(x))


@pytest.mark.parametrize("form", FORMS)
def test_reset_parameters_gives_the_initial_values_back(form: str) -> None:
    connection = make(form, 4, per_layer=2)
    drawn = {name for name, parameter in connection.named_parameters() if parameter.dim() == 2 and "norm." not in name}
    drawn -= {"weights", "queries", "key_weights", "gamma"}
    before = {name: parameter.clone() for name, parameter in connection.named_parameters()}
    randomise(connection).reset_parameters()
    for name, parameter in connection.named_parameters():
        same = torch.allclose(parameter, before[name], rtol=1e-6)  # 1 / 3 was made in float32
        assert same if name not in drawn else not same, name


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_round_trip(form: str) -> None:
    first, second = randomise(model(form)), model(form)
    second.load_state_dict(first.state_dict())
    src, tgt = batch()
    assert torch.equal(first(src, tgt), second(src, tgt))


NOT_DECAYING = {
    "rezero": {"alpha"},
    "layerscale": {"gamma"},
    "dlcl": {"weights"},
    "denseformer": {"weights"},
    "attention-residuals": {"queries", "key_weights"},
}


@pytest.mark.parametrize("name", NAMES)
def test_mixing_weights_and_norms_do_not_decay(name: str) -> None:
    encoder = dl.Encoder(C, 2, 3, connection=name)
    assert encoder.connection.no_weight_decay() == NOT_DECAYING.get(name, set())
    decaying, kept = (set(map(id, group["params"])) for group in dl.param_groups(encoder))
    matrices = {id(each.weight) for each in encoder.modules() if isinstance(each, nn.Linear)}
    assert decaying == matrices
    assert len(kept) + len(decaying) == len(list(encoder.parameters()))


def test_other_modules_may_name_parameters_too() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.matrix = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"table"}

    mixer = nn.Sequential(Mixer())
    decaying, kept = dl.param_groups(mixer)
    assert [each is mixer[0].matrix for each in decaying["params"]] == [True]
    assert [each is mixer[0].table for each in kept["params"]] == [True]


class Hooked(nn.LayerNorm):
    """A norm that no fused op may stand in for."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("form", [form for form in FORMS if "rms" not in form and not form.startswith("depth")])
def test_norms_of_the_users_own_are_called(form: str) -> None:
    """A step takes a norm's parameters past the module only where the module does no more than its class."""
    connection, x, functions = randomise(make(form, 6, per_layer=2)), normal(2, C), branches(6)
    for module in list(connection.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                own = Hooked(C, 1e-6, dtype=F64)
                own.load_state_dict(child.state_dict())
                setattr(module, name, own)
    by_step, by_calls = run(connection, x, functions)[0], run(connection, x, functions, fused=False)[0]
    torch.testing.assert_close(by_step, by_calls, rtol=1e-12, atol=1e-12)
    for module in connection.modules():
        if isinstance(module, Hooked):
            with torch.no_grad():
                module.weight.mul_(2)
                module.bias.mul_(2)
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
    torch.testing.assert_close(run(connection, x, functions)[0], by_step, rtol=1e-12, atol=1e-12)


# elements a token, in units of C, of six branches in three layers: written out, not by the class's formula
ELEMENTS = {
    "pre-norm": 2 + 5 * 4 + 3 + 2,
    "post-norm": 6 * 3,
    "sandwich": 2 + 5 * 4 + 3 + 2,
    "deepnorm": 6 * 3,
    "keel": 2 + 5 * 4 + 3,
    "siamese": 2 + 5 * 6 + 5 + 3,
    "rezero": 2 + 5 * 4 + 3 + 2,
    "layerscale": 2 + 5 * 4 + 3 + 2,
    "depth-lstm": 6 * 7 + 2,
    "depth-gru": 6 * 6 + 2,
    "dlcl": (2 + 3 + 4 + 5) + 3 * (2 + 4 + 3) + 2,
    "dlcl, post": (2 + 3 + 4 + 5) + 3 * (3 + 3 + 2),
    # the first sum has two sources: one pass over the first, and one of the second with the norm
    "denseformer": 2 + (4 + 3 + 2 + 4) + (4 + 3 + 3 + 4) + (4 + 3 + 5) + 2,
    # no sum, then one of one source, which is read once for both operands
    "denseformer, dilation 3, period 2": 2 + (4 + 4) + (4 + 3 + 3) + (4 + 3) + 2,
    "attention-residuals": 2 + (3 + 4 + 5 + 6 + 7 + 8),
    "attention-residuals, block": 2 + (3 + 3 + 3 + 4 + 4 + 4) + 4 * 3,
}


@pytest.mark.parametrize("form", ELEMENTS)
def test_bytes_moved(form: str) -> None:
    connection = make(form, 6, per_layer=2)
    assert connection.bytes_moved(rows=10, itemsize=2) == 10 * C * 2 * ELEMENTS[form]


@pytest.mark.parametrize(("branches_", "size", "sources"), [(6, None, 7), (7, 3, 4), (6, 3, 3), (1, 4, 2), (5, 1, 6)])
def test_blocks_of_attention_residuals(branches_: int, size: int | None, sources: int) -> None:
    """The embedded input is always a source, and the last block may be partial."""
    connection = dl.connections.AttentionResiduals(C, branches_, block_size=size).double()
    x, outputs = normal(2, C), [normal(2, C) for _ in range(branches_)]
    state = connection.start(x)
    assert torch.equal(connection.read(state, 0), connection.read_norms[0](x))  # one source: no query
    for i, y in enumerate(outputs):
        state = connection.write(state, y, i)
    assert len(state) == sources
    assert torch.equal(state[0], x)
    torch.testing.assert_close(sum(state[1:]), sum(outputs))
    if size is not None:
        last = outputs[(branches_ - 1) // size * size :]
        torch.testing.assert_close(state[-1], sum(last))


def test_denseformer_keeps_only_what_later_sums_read() -> None:
    connection = dl.connections.DenseFormer(C, 12, branches_per_layer=2, dilation=2, period=2).double()
    state = connection.start(normal(2, C))
    for i in range(12):
        state = connection.write(state, normal(2, C), i)
    assert len(state) == 1  # nothing follows
    connection = dl.connections.DenseFormer(C, 8, branches_per_layer=2, dilation=2, period=2).double()
    state = connection.start(normal(2, C))
    for i in range(4):
        state = connection.write(state, normal(2, C), i)
    assert len(state) == 1 + 2  # x, and the blocks 0 and 2 that the sum after block 4 reads


def test_names() -> None:
    assert all(issubclass(dl.connections.get(name), Connection) for name in dl.connections.names())
    known = re.escape(", ".join(map(repr, NAMES)))
    with pytest.raises(ValueError, match=rf"connection must be one of {known}; found 'residual'"):
        dl.connections.get("residual")
    with pytest.raises(ValueError, match="connection must be one of"):
        dl.Encoder(C, 2, 1, connection="residual")


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: PreNorm(0, 2), ValueError, "d_model must be at least 1; found 0"),
    (lambda: PreNorm(C, 2.0), TypeError, "num_branches must be an int; found float"),
    (lambda: PreNorm(C, 2, norm="batch"), ValueError, "norm must be one of"),
    (
        lambda: dl.connections.DLCL(C, 5, branches_per_layer=2),
        ValueError,
        "branches_per_layer must divide num_branches",
    ),
    (lambda: dl.connections.DenseFormer(C, 4, period=0), ValueError, "period must be at least 1"),
    (lambda: dl.connections.AttentionResiduals(C, 4, block_size=0), ValueError, "block_size must be at least 1"),
    (
        lambda: dl.connections.DepthGRU(C, 4, bias=False, update_bias=2.0),
        ValueError,
        "update_bias must be 0 with bias=False",
    ),
    (lambda: dl.connections.DepthLSTM(C, 4, init_cell="ones"), ValueError, "init_cell must be one of"),
    (lambda: dl.connections.DeepNorm(C, 4, alpha=float("inf")), ValueError, "alpha must be finite"),
    (lambda: Connection(C, 1).read((), 0), NotImplementedError, r"Connection must define read\(state, i\)"),
    (lambda: Connection(C, 1).write((), normal(C), 0), NotImplementedError, "Connection must define write"),
    (lambda: Connection(C, 1).bytes_moved(1), NotImplementedError, "Connection has no formula for bytes_moved"),
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG, ids=[row[2][:40] for row in WRONG])
def test_wrong_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_update_bias_keeps_more_of_the_state() -> None:
    low, high = (dl.connections.DepthGRUCell(C, C, update_bias=value, bias=True).double() for value in (0.0, 20.0))
    low_bias = low.input_proj.bias
    assert torch.equal(low_bias, torch.zeros_like(low_bias))
    y, h = normal(3, C), normal(3, C)
    torch.testing.assert_close(high(y, h), h, rtol=1e-5, atol=1e-5)
    normed = dl.connections.DepthGRUCell(C, C, update_bias=2.0, gate_norm=True, bias=False)
    assert torch.equal(normed.norm.bias[1], torch.full((C,), 2.0))


def test_every_class_has_the_names_of_its_options_in_its_docstring() -> None:
    for name in NAMES:
        cls = dl.connections.get(name)
        own = [p for p in inspect.signature(cls).parameters if p not in ("d_model", "num_branches")]
        text = f"{cls.__doc__} {PreNorm.__doc__}"
        assert all(option in text for option in own), name


def test_partial_keeps_its_own_options() -> None:
    """What a stack tells a connection never overrides what the caller chose."""
    factory = functools.partial(dl.connections.DLCL, branches_per_layer=1)
    assert dl.Encoder(C, 2, 3, connection=factory).connection.num_layers == 6
    assert dl.Encoder(C, 2, 3, connection="dlcl").connection.num_layers == 3
    assert dl.Decoder(C, 2, 3, connection="dlcl").connection.branches_per_layer == 3
