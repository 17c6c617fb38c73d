"""Initialisations: what is drawn from what, and that nothing else is touched."""

from __future__ import annotations

import math

import pytest
import torch
from connection_helpers import FORMS
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.initialisation import INITS

WIDTH, LAYERS = 64, 4
MATRICES = ("in_proj.weight", "q_proj.weight", "kv_proj.weight", "out_proj.weight", "linear1.weight", "linear2.weight")
CELL_MATRICES = (
    "gates.weight",
    "ffn_in.weight",
    "ffn_out.weight",
    "input_proj.weight",
    "state_proj.weight",
    "reset_weight",
)


def stacks(init: str, form: str = "pre-norm") -> list[tuple[dl.Encoder | dl.Decoder, int]]:
    """An encoder and a decoder, each with its number of branches a layer."""
    options = {"connection": FORMS[form], "init": init, "feed_forward": True, "dropout": 0.0}
    encoder = dl.Encoder(WIDTH, 2, LAYERS, **options)
    return [(encoder, 2), (dl.Decoder(WIDTH, 2, LAYERS, decoder_attention="separate", **options), 3)]


def parts(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The logical matrices that are stacked in a weight."""
    kinds = {"in_proj.weight": "qkv", "kv_proj.weight": "kv", "q_proj.weight": "q"}
    own = next((kinds[end] for end in kinds if name.endswith(end)), None)
    if own is None:
        return {"out": weight}
    return dict(zip(own, weight.chunk(len(own)), strict=True))


@pytest.mark.parametrize("init", INITS)
def test_matrices_have_the_spread_of_their_formula(init: str) -> None:
    for stack, branches in stacks(init):
        for name, weight in stack.layers.named_parameters():
            if weight.dim() < 2:
                assert torch.equal(weight, torch.zeros_like(weight)), name
                continue
            assert name.endswith(MATRICES), name
            layer = int(name.split(".")[0]) + 1
            for kind, part in parts(name, weight).items():
                fan_out, fan_in = part.shape
                glorot = math.sqrt(2 / (fan_in + fan_out))
                beta = (4 * branches * LAYERS) ** -0.25
                wanted = {
                    "lipschitz": 1 / math.sqrt(3 * fan_in),
                    "glorot": glorot,
                    "ds": glorot / math.sqrt(layer),
                    "ds-released": glorot / layer**0.25,
                    "depth": 0.02 / math.sqrt(2 * layer),
                    "deepnorm": glorot * (beta if kind in ("v", "out") else 1.0),
                }[init]
                assert part.std().item() == pytest.approx(wanted, rel=0.05), (name, kind)
                assert abs(part.mean().item()) < 0.1 * wanted


@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_matrices_is_touched(form: str) -> None:
    """A loop over all parameters: norms, mixing weights, queries and states are those of the connection itself."""
    reference: dict[str, Tensor] = {}
    for init in INITS:
        for index, (stack, _) in enumerate(stacks(init, form)):
            with torch.no_grad():  # values that no initialisation gives
                for parameter in stack.parameters():
                    parameter.fill_(7.0)
            stack._draw()
            for name, parameter in stack.named_parameters():
                drawn = name.endswith(MATRICES if name.startswith("layers.") else CELL_MATRICES)
                zeroed = name.startswith("layers.") and name.endswith(".bias")
                if drawn:
                    assert not (parameter == 7.0).any(), (init, name)
                else:
                    assert (parameter == (0.0 if zeroed else 7.0)).all(), (init, name)
                reference[f"{index}.{name}"] = parameter
    assert any("norm" in name for name in reference)


def test_shared_cells_are_drawn_for_the_first_layer() -> None:
    encoder = dl.Encoder(WIDTH, 2, LAYERS, connection=FORMS["depth-lstm, ffn"], init="ds")
    weight = encoder.connection.cells[0].ffn_out.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.05)


def test_deepnorm_of_an_encoder_and_a_decoder() -> None:
    """The paper's table: alpha and beta by the depths of both."""
    translator = dl.Transformer(11, 13, WIDTH, 2, 6, 3, connection="deepnorm", init="deepnorm")
    depth = (6**4 * 3) ** (1 / 16)
    assert translator.encoder.connection.a == pytest.approx(0.81 * depth)
    assert translator.decoder.connection.a == pytest.approx((3 * 3) ** 0.25)
    out = translator.encoder.layers[0].linear1.weight
    assert out.std().item() == pytest.approx(0.87 / depth * math.sqrt(2 / sum(out.shape)), rel=0.05)
    out = translator.decoder.layers[0].linear1.weight
    assert out.std().item() == pytest.approx((12 * 3) ** -0.25 * math.sqrt(2 / sum(out.shape)), rel=0.05)
    translator.reset_parameters()
    again = translator.encoder.layers[0].linear1.weight
    assert again.std().item() == pytest.approx(0.87 / depth * math.sqrt(2 / sum(again.shape)), rel=0.05)
    alone = dl.Encoder(WIDTH, 2, 8, connection="deepnorm")
    assert alone.connection.a == pytest.approx((2 * 8) ** 0.25)


def test_one_seed_gives_one_model() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(dl.Transformer(11, 13, 8, 2, 2, 2, init="ds", memory="multiscale").state_dict())
    assert all(map(torch.equal, found[0].values(), found[1].values()))


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"init must be one of 'lipschitz', 'glorot', 'ds', 'ds-released'"):
        dl.Encoder(8, 2, 1, init="normal")


def test_users_matrices_are_their_own() -> None:
    class Own(dl.connections.PreNorm):
        def __init__(self, d_model: int, num_branches: int) -> None:
            super().__init__(d_model, num_branches)
            self.mix = nn.Linear(d_model, d_model)
            nn.init.eye_(self.mix.weight)

    encoder = dl.Encoder(8, 2, 1, connection=Own, init="glorot")
    assert torch.equal(encoder.connection.mix.weight, torch.eye(8))
