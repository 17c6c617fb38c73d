"""Greedy decoding of a Transformer with a key/value cache, in tokens a second."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.decode.captured import CapturedDecoder

from ..measure import accuracy
from ..measure.calls import Runs, on_backend
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

FEATURES, HEADS, LAYERS, VOCABULARY = 256, 4, 6, 8000
SOURCE_LENGTH, TOKENS = 32, 32
BATCHES = (1, 8)


def build(
    features: int = FEATURES, layers: int = LAYERS, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> dict[str, dl.reference.DepthLSTMTransformer]:
    """Return the reference model, the fused one and the fused one with folded output projections.

    All have the same random weights.
    """
    sizes: dict[str, Any] = {
        "d_model": features,
        "nhead": HEADS,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
        "dtype": dtype,
    }
    eager = dl.reference.DepthLSTMTransformer(vocabulary, vocabulary, **sizes).eval()
    with torch.no_grad():
        # the logit of eos is then 0, never the largest of thousands, so every sentence takes all the tokens
        eager.tgt_embedding.weight[eager.eos_id] = 0
    fused, folded = (dl.DepthLSTMTransformer(vocabulary, vocabulary, **sizes).eval() for _ in range(2))
    for model in (fused, folded):
        model.load_state_dict(eager.state_dict())
    dl.fold_output_projections(in_pytorch(folded))  # the decode engine has no use for folds
    return {"eager": eager, "fused": fused, "folded": folded}


def in_pytorch(model: Any) -> Any:
    """Return the model, whose ``generate()`` then searches in PyTorch, not in the decode engine."""
    model._search = lambda *arguments: None
    return model


def greedy(model: dl.reference.DepthLSTMTransformer, source: Tensor, length: int) -> Tensor:
    """Return tokens (batch, length) for source (batch, S)."""
    tokens = model.generate(source, max_length=length)
    return tokens if isinstance(tokens, Tensor) else tokens[0]


def weight_bytes(features: int, layers: int, vocabulary: int, steps: int, folded: bool) -> int:
    """Return the bytes of the fp32 matrices that ``steps`` tokens read.

    The matrices of the encoder and of the memory's keys and values are read once, all others in each step. A folded
    encoder layer has one D x D matrix less. Decoder layers, whose two attentions are added, do not fold.
    """
    square = features * features
    once = layers * ((11 if folded else 12) * square + 2 * square)
    each = layers * (4 + 2 + 8) * square + vocabulary * features
    return 4 * (once + steps * each)


def greedy_decoding(place: Place, batch: int, folded: bool) -> Problem:
    """Make the problem: the encoder and ``TOKENS`` steps."""
    models = {name: model.to(place.device) for name, model in build().items()}
    source = torch.randint(3, VOCABULARY, (batch, SOURCE_LENGTH), device=place.device)
    eager, fused = models["eager"], models["folded" if folded else "fused"]
    for name, model in (("eager", eager), ("fused", fused)):
        length = greedy(model, source, TOKENS).shape[1]
        if length != TOKENS:
            raise RuntimeError(f"the {name} model stopped after {length} of {TOKENS} tokens")
    runs: Runs = {"eager": lambda: greedy(eager, source, TOKENS), **place.fused(lambda: greedy(fused, source, TOKENS))}
    label = f"decoding, batch {batch}" + (", folded" if folded else "")
    row = Row("decoding", label, "fp32", f"d={FEATURES} {LAYERS}+{LAYERS} layers", "tokens/s")
    row.note = f"greedy, {SOURCE_LENGTH} tokens in, {TOKENS} out, encoder included"
    read, targets = weight_bytes(FEATURES, LAYERS, VOCABULARY, TOKENS, folded), [Target("eager", "speedup")]
    return Problem(row, runs, targets, 1.5, grad=False, tokens=batch * TOKENS, moved_bytes=read, place=place)


def captured_decoding(
    place: Place, features: int, heads: int, layers: int, vocabulary: int, batch: int, beams: int
) -> Problem:
    """Make the problem of a search whose steps are CUDA graphs, against the same search launched kernel by kernel."""
    model = dl.DepthLSTMTransformer(
        vocabulary, vocabulary, features, heads, num_encoder_layers=layers, num_decoder_layers=layers
    )
    with torch.no_grad():
        model.tgt_embedding.weight[model.eos_id] = 0
    model = in_pytorch(model.eval().to(place.device))
    source = torch.randint(4, vocabulary, (batch, SOURCE_LENGTH), device=place.device)

    def captured(backend: str) -> Callable[..., Any]:
        return on_backend(backend, functools.partial(CapturedDecoder(model).generate, source, TOKENS, beams))

    def verify(backend: str) -> accuracy.Check:
        served = functools.partial(CapturedDecoder(model).generate, source, TOKENS, beams, return_scores=True)
        found: Any = on_backend(backend, served)()
        wanted: Any = model.generate(source, TOKENS, beams, return_scores=True)
        (tokens, scores), (wanted, wanted_scores) = found, wanted
        error = (scores - wanted_scores).abs().max().item() if torch.equal(tokens, wanted) else math.inf
        return accuracy.Check("decoding", "fp32", error < 1e-4, "scores", error, 0.0, error / 1e-4, backend, row.size)

    runs: Runs = {"eager": lambda: model.generate(source, TOKENS, beams)}
    runs |= {backend: captured(backend) for backend in place.backends}
    search = "greedy" if beams == 1 else f"beam {beams}"
    size = f"d={features} {layers}+{layers} layers"
    row = Row("decoding", f"captured decoding, batch {batch}, {search}", "fp32", size, "tokens/s")
    row.note = f"{SOURCE_LENGTH} tokens in, {TOKENS} out; eager is generate() with fused cells, kernel by kernel"
    targets = [Target("eager", "speedup")]
    return Problem(
        row, runs, targets, 1.0, grad=False, tokens=batch * TOKENS, place=place, clock="latency", verify=verify
    )


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check a small model: its logits in ``dtype``, and in fp64 its tokens.

    In fp64 no two logits are close, so the tokens must be equal.
    """
    exact, models = build(64, 2, 100, torch.float64), build(64, 2, 100, dtype)
    for name, module in models.items():
        module.load_state_dict(models["eager"].state_dict())
        exact[name].load_state_dict(models["eager"].state_dict())
    source, target = torch.randint(3, 100, (3, 7)), torch.randint(3, 100, (3, 9))
    with torch.no_grad():
        logits = {name: module(source, target) for name, module in models.items()}
        for name in ("fused", "folded"):
            wanted = [exact["eager"](source, target)]
            yield accuracy.compare("decoding", dtype, [f"{name} logits"], wanted, [logits["eager"]], [logits[name]])
        tokens = {name: greedy(module, source, 12) for name, module in exact.items()}
    for name in ("fused", "folded"):
        same, backend = torch.equal(tokens[name], tokens["eager"]), dl.last_backend() or "none"
        yield accuracy.Check("decoding", "fp64", same, f"{name} tokens", float(not same), 0.0, float(not same), backend)


SUBJECT = Subject(
    "decoding",
    {
        f"batch {batch}{' folded' if folded else ''}": functools.partial(greedy_decoding, batch=batch, folded=folded)
        for batch in BATCHES
        for folded in (False, True)
    },
    check,
)
