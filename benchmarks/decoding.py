"""Greedy decoding of a Transformer with a key/value cache, in tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.bench.compiled import Compiled
from depthlstm_fast.bench.rows import Row, Settings, Target, figure
from depthlstm_fast.bench.timing import interleave, spread

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


def measure(settings: Settings, compiled: Compiled, tick: Callable[[], None]) -> Iterator[Row]:
    """Two rows for each batch size: fused, and fused with folded output projections."""
    models = build()
    for batch in BATCHES:
        source = torch.randint(3, VOCABULARY, (batch, SOURCE_LENGTH))
        for name, model in models.items():  # the warm-up, too
            length = greedy(model, source, TOKENS).shape[1]
            if length != TOKENS:
                raise RuntimeError(f"the {name} model stopped after {length} of {TOKENS} tokens")
        runs: dict[str, Callable[[], object]] = {
            name: lambda m=model, s=source: greedy(m, s, TOKENS)  # type: ignore[misc]
            for name, model in models.items()
        }
        samples = interleave(runs, seconds=2.5 * settings.seconds, minimum=settings.minimum, warmups=0, on_repetition=tick)
        speeds = {name: spread([batch * TOKENS / time for time in times]) for name, times in samples.items()}
        for name in ("fused", "folded"):
            size = f"d={FEATURES} {LAYERS}+{LAYERS} layers"
            label = f"decoding, batch {batch}" + (", folded" if name == "folded" else "")
            row = Row("decoding", label, "fp32", size, "tokens/s", repetitions=len(samples[name]))
            row.values = {"eager": speeds["eager"], "fused": speeds[name]}
            row.figures = [figure(Target("eager", "speedup"), {"eager": samples["eager"], "fused": samples[name]})]
            row.note = f"greedy, {SOURCE_LENGTH} tokens in, {TOKENS} out, encoder included"
            yield row
