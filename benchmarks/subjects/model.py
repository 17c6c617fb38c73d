"""One training step of a whole model (forward, loss, backward, no optimizer).

The rival is a residual Transformer of equal parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy, matrix_products
from ..measure.calls import Runs
from ..measure.matrix_products import Product, matrix_entries
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

FEATURES, HEADS, LAYERS, VOCABULARY, BATCH, LENGTH = 256, 4, 4, 2000, 8, 64
RESIDUAL = "pre-norm Transformer"


class ResidualTransformer(nn.Module):
    """A pre-norm Transformer of torch's own layers, without dropout.

    It has GELU, 4D features within, a tied output and a fixed table of positions.
    """

    positions: Tensor

    def __init__(self, vocabulary: int, features: int, heads: int, layers: int, positions: Tensor) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.source_embedding, self.target_embedding = (
            nn.Embedding(vocabulary, features),
            nn.Embedding(vocabulary, features),
        )
        self.register_buffer("positions", positions)
        encoder = nn.TransformerEncoderLayer(features, heads, 4 * features, **sizes)
        decoder = nn.TransformerDecoderLayer(features, heads, 4 * features, **sizes)
        self.encoder = nn.TransformerEncoder(encoder, layers, nn.LayerNorm(features), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, nn.LayerNorm(features))
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=features**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (batch, T, vocabulary) for source (batch, S) and target (batch, T)."""

        def embed(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
            return embedding.embedding_dim**0.5 * embedding(tokens) + self.positions[: tokens.shape[1]]

        memory = self.encoder(embed(source, self.source_embedding))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        states = self.decoder(embed(target, self.target_embedding), memory, tgt_mask=mask, tgt_is_causal=True)
        return F.linear(states, self.target_embedding.weight)


def build(
    features: int = FEATURES, heads: int = HEADS, layers: int = LAYERS, vocabulary: int = VOCABULARY
) -> dict[str, nn.Module]:
    """Return the reference model, the fused one and the residual one.

    The fused model has the reference's parameters. The residual model has as many matrix entries.

    Raises:
        ValueError: the residual model's matrices have more or fewer entries.
    """
    sizes: dict[str, Any] = {
        "d_model": features, "nhead": heads, "num_encoder_layers": layers, "num_decoder_layers": layers, "dropout": 0.0,
    }  # fmt: skip
    eager, fused = (
        module(vocabulary, vocabulary, **sizes)
        for module in (dl.reference.DepthLSTMTransformer, dl.DepthLSTMTransformer)
    )
    fused.load_state_dict(eager.state_dict())
    # any fixed table costs the same
    residual = ResidualTransformer(vocabulary, features, heads, layers, torch.randn(LENGTH, features))
    if matrix_entries(residual) != matrix_entries(fused):
        raise ValueError(
            f"models of unequal size: {matrix_entries(residual)} and {matrix_entries(fused)} matrix entries"
        )
    return {"eager": eager, "fused": fused, "against": residual}


def step(model: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the loss of predicting each next token of target (batch, T + 1), and the gradients of all parameters."""
    logits = model(source, target[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
    return (loss, *torch.autograd.grad(loss, list(model.parameters())))


def needed_products(batch: int, length: int, features: int, heads: int, layers: int, vocabulary: int) -> list[Product]:
    """Return the products of all layers and of the output layer; source and target are equally long."""
    encoder = matrix_products.encoder_layer(batch, length, features, heads)
    decoder = matrix_products.decoder_layer(batch, length, length, features, heads)
    return [*layers * encoder, *layers * decoder, Product(1, batch * length, features, vocabulary)]


def training(place: Place, batch: int = BATCH) -> Problem:
    """Make the problem: all three models on the same batch."""
    models = {name: module.to(place.device) for name, module in build().items()}
    source, target = (
        torch.randint(3, VOCABULARY, (batch, length), device=place.device) for length in (LENGTH, LENGTH + 1)
    )
    needed = needed_products(batch, LENGTH, FEATURES, HEADS, LAYERS, VOCABULARY)
    runs: Runs = {"eager": lambda: step(models["eager"], source, target)}
    runs |= place.fused(lambda: step(models["fused"], source, target))
    runs["against"] = lambda: step(models["against"], source, target)
    runs["floor"] = matrix_products.training_run(needed, torch.float32, place.device)
    size = f"{batch}x{LENGTH} d={FEATURES} {LAYERS}+{LAYERS} layers"
    row = Row(
        "model", "model training step", "fp32", size, "ms", against=RESIDUAL, others={"floor": "its bare products"}
    )
    row.note = f"{matrix_entries(models['fused']) / 1e6:.2f}M matrix entries in each model, vocabulary {VOCABULARY}"
    targets = [Target("eager", "speedup"), Target("against", "ratio")]
    return Problem(row, runs, targets, 5.0, flops=matrix_products.training_flops(needed), floor="floor", place=place)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check loss and all gradients of a small model on one batch; the bound allows one rounding a layer."""
    layers = 2
    models, exact_models = (build(32, 4, layers, 50) for _ in range(2))
    exact = exact_models["eager"].double()
    exact.load_state_dict(models["eager"].state_dict())
    source, target = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 8))
    names = ["loss", *(f"gradient of {name}" for name, _ in models["fused"].named_parameters())]
    contestants = exact, models["eager"].to(dtype), models["fused"].to(dtype)
    wanted, eager, fused = (step(module, source, target) for module in contestants)
    yield accuracy.compare("model", dtype, names, wanted, eager, fused, 2 * layers)


SUBJECT = Subject("model", {"transformer": training}, check)
