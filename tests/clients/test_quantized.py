"""Linear layers quantised to 8 bits: the replaced modules, and the change of the results.

Weight-only quantisation is compared with the plain model with the same rounded weights. No such model exists if
activations are quantised as well. The results are then compared with a share of the largest logit, four times the one
seen. The tests were run with torchao 0.18.0 and torch 2.13.0.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from client_helpers import batch, model
from helpers import HAS_CPP
from torch import Tensor, nn

import depthlstm_fast as dl


def linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def assert_fused() -> None:
    assert dl.last_backend() == "cpp" or not HAS_CPP


def test_torchao_int8_weight_only() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plain = model(hidden="ffn", sublayer=True).eval()
    quantized = copy.deepcopy(plain)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    assert linears(quantized) == linears(plain)
    rounded = copy.deepcopy(plain)
    rounded.output.weight = nn.Parameter(rounded.output.weight.detach().clone())  # quantising ends the tie
    for name in linears(plain):
        weight = quantized.get_submodule(name).weight
        assert type(weight) is not nn.Parameter, name
        with torch.no_grad():
            rounded.get_submodule(name).weight.copy_(weight.dequantize())
    with torch.no_grad():
        found, wanted, exact = quantized(*batch()), rounded(*batch()), plain(*batch())
        assert_fused()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    assert type(quantized.tgt_embedding.weight) is nn.Parameter  # no longer the output layer's
    assert dl.fold_output_projections(quantized) == 4
    with torch.no_grad():
        torch.testing.assert_close(quantized(*batch()), found, rtol=0, atol=0)  # only plain nn.Linear is folded
    for beams in (1, 3):
        tokens = [m.generate(batch()[0], max_length=6, beam_size=beams) for m in (quantized, rounded)]
        torch.testing.assert_close(*tokens)
    assert_fused()


@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch is built without quantised kernels")
@pytest.mark.filterwarnings("ignore:.*quantization.*:DeprecationWarning", "ignore::UserWarning:torch.*")
def test_dynamic_int8() -> None:
    plain = model().eval()
    quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)
    assert linears(quantized) == []
    changed = [
        name for name, child in quantized.named_modules() if isinstance(child, torch.ao.nn.quantized.dynamic.Linear)
    ]
    assert changed == linears(plain)
    with torch.no_grad():
        found, exact = quantized(*batch()), plain(*batch())
    assert_fused()
    assert 0 < (found - exact).abs().max() < 0.2 * exact.abs().max()
    # With a cache the activations' ranges are those of one position, without one those of all. Tokens may differ,
    # scores hardly.
    tokens, scores = quantized.generate(batch()[0], max_length=6, length_penalty=0.0, return_scores=True)
    assert_fused()
    torch.testing.assert_close(scores, log_probability(plain, batch()[0], tokens), rtol=0.1, atol=0.1)


def log_probability(plain: Any, source: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each row's tokens up to eos_id, by the model ``plain``."""
    with torch.no_grad():
        logp = plain(source, torch.cat((torch.ones_like(tokens[:, :1]), tokens[:, :-1]), 1)).log_softmax(-1)
    counted = (tokens == plain.eos_id).cumsum(1) - (tokens == plain.eos_id).long() == 0
    return (logp.gather(2, tokens[..., None])[..., 0] * counted).sum(1)
