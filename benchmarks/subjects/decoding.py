"""Greedy decoding of a Transformer with a key/value cache, in tokens a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure.compiled import Compiled
from ..measure.problems import Problem, Runs
from ..measure.rows import Row, Target

FEATURES, HEADS, LAYERS, VOCABULARY = 256, 4, 6, 8000
SOURCE_LENGTH, TOKENS = 32, 32
BATCHES = (1, 8)


def build(
    features: int = FEATURES, layers: int = LAYERS, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> dict[str, dl.reference.DepthLSTMTransformer]:
    """The reference model, the fused one and the fused one with folded output projections; random weights, the same in all."""
    sizes: dict[str, Any] = {
        "d_model": features,
        "nhead": HEADS,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
        "dtype": dtype,
    }
    eager = dl.reference.DepthLSTMTransformer(vocabulary, vocabulary, **sizes).eval()
    with torch.no_grad():
        # its logit is then 0, which is never the largest of thousands: every sentence takes all the tokens
        eager.tgt_embedding.weight[eager.eos_id] = 0
    fused, folded = (dl.DepthLSTMTransformer(vocabulary, vocabulary, **sizes).eval() for _ in range(2))
    for model in (fused, folded):
        model.load_state_dict(eager.state_dict())
    dl.fold_output_projections(folded)
    return {"eager": eager, "fused": fused, "folded": folded}


def greedy(model: dl.reference.DepthLSTMTransformer, source: Tensor, length: int) -> Tensor:
    """Tokens (batch, length) for source (batch, S)."""
    tokens = model.generate(source, max_length=length)
    return tokens if isinstance(tokens, Tensor) else tokens[0]


def weight_bytes(features: int, layers: int, vocabulary: int, steps: int, folded: bool) -> int:
    """Bytes of the fp32 matrices that ``steps`` tokens read: the encoder's and the memory's keys and values once, all others in each step.

    A folded encoder layer has one D x D matrix less; decoder layers, whose two attentions are added, do not fold.
    """
    square = features * features
    once = layers * ((11 if folded else 12) * square + 2 * square)
    each = layers * (4 + 2 + 8) * square + vocabulary * features
    return 4 * (once + steps * each)


def greedy_decoding(batch: int, folded: bool, compiled: Compiled) -> Problem:
    """The encoder and ``TOKENS`` steps."""
    models = build()
    source = torch.randint(3, VOCABULARY, (batch, SOURCE_LENGTH))
    chosen = {"eager": models["eager"], "fused": models["folded" if folded else "fused"]}
    for name, model in chosen.items():
        length = greedy(model, source, TOKENS).shape[1]
        if length != TOKENS:
            raise RuntimeError(f"the {name} model stopped after {length} of {TOKENS} tokens")
    runs: Runs = {
        "eager": lambda: greedy(chosen["eager"], source, TOKENS),
        "fused": lambda: greedy(chosen["fused"], source, TOKENS),
    }
    label = f"decoding, batch {batch}" + (", folded" if folded else "")
    row = Row("decoding", label, "fp32", f"d={FEATURES} {LAYERS}+{LAYERS} layers", "tokens/s")
    row.note = f"greedy, {SOURCE_LENGTH} tokens in, {TOKENS} out, encoder included"
    read = weight_bytes(FEATURES, LAYERS, VOCABULARY, TOKENS, folded)
    return Problem(row, runs, [Target("eager", "speedup")], 1.5, grad=False, tokens=batch * TOKENS, moved_bytes=read)


PROBLEMS: dict[str, Callable[[Compiled], Problem]] = {
    f"batch {batch}{' folded' if folded else ''}": functools.partial(greedy_decoding, batch, folded)
    for batch in BATCHES
    for folded in (False, True)
}
