"""A small language model, and a language model written out token by token, for the tests of dl.LanguageModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

F64 = torch.float64
VOCAB = 23
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "nhead": 4, "num_layers": 2}
SMALL |= {"dropout": 0.0, "max_len": 24, "eos_id": None, "dtype": F64}


@torch.no_grad()
def randomise(module: nn.Module, scale: float = 0.3) -> Any:
    """Every parameter moved, so that no term is one or zero."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return module


def model(**options: Any) -> dl.LanguageModel:
    return randomise(dl.LanguageModel(**{**SMALL, **options}))


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def by_hand(model: dl.LanguageModel, ids: Tensor) -> Tensor:
    """Logits (length, vocab) of ids (length,): pre-norm, RMSNorm, grouped queries, SwiGLU, one token after another.

    Rotary positions are products of complex numbers here, and attention sums over earlier tokens in a loop.
    """
    size = model.d_model // model.nhead
    states = [row * math.sqrt(model.d_model) for row in model.embedding.weight[ids]]
    norms, weights = model.decoder.connection, {}

    def normalise(x: Tensor, norm: Any) -> Tensor:
        return x / (x.square().mean() + norm.eps).sqrt() * norm.weight

    def turn(head: Tensor, position: int) -> Tensor:
        pairs = torch.complex(head[: size // 2], head[size // 2 :])
        exponents = torch.arange(size // 2, dtype=F64) * 2 / size
        turned = pairs * torch.polar(torch.ones_like(exponents), position * model.rope_theta**-exponents)
        return torch.cat((turned.real, turned.imag))

    for index, layer in enumerate(model.decoder.layers):
        weights = dict(layer.named_parameters())
        queries, keys, values = [], [], []
        for position, x in enumerate(states):
            z = weights["self_attn.in_proj.weight"] @ normalise(x, norms.read_norms[2 * index])
            z = z.view(-1, size)
            queries.append([turn(head, position) for head in z[: model.nhead]])
            keys.append([turn(head, position) for head in z[model.nhead : model.nhead + model.kv_heads]])
            values.append(list(z[model.nhead + model.kv_heads :]))
        for position in range(len(states)):
            heads = []
            for head in range(model.nhead):
                group = head // (model.nhead // model.kv_heads)
                scores = [queries[position][head] @ keys[j][group] / math.sqrt(size) for j in range(position + 1)]
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(shares[j] * values[j][group] for j in range(position + 1)))
            states[position] = states[position] + weights["self_attn.out_proj.weight"] @ torch.cat(heads)
            u = normalise(states[position], norms.read_norms[2 * index + 1])
            gate, value = (weights["linear1.weight"] @ u).chunk(2)
            states[position] = states[position] + weights["linear2.weight"] @ (gate * gate.sigmoid() * value)
    return torch.stack([model.output.weight @ normalise(x, norms.final_norm) for x in states])
