"""The decode engine against the same search in PyTorch and, where it is installed, against CTranslate2.

The rival's model is a residual Transformer of equal width, depth and vocabulary, since CTranslate2 has no other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

import depthlstm_fast as dl

from ..measure import accuracy, ctranslate2_rival
from ..measure.calls import Runs
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target
from .decoding import LAYERS, SOURCE_LENGTH, TOKENS, in_pytorch

SIZES = {"d=256": (256, 4, 8000), "d=512": (512, 8, 32000)}  # features, heads, vocabulary
NARROW = ("bfloat16", "int8")


def model(features: int, heads: int, vocabulary: int) -> Any:
    """Return a model that never ends: the logit of eos is 0, never the largest of thousands."""
    sizes: dict[str, Any] = {"d_model": features, "nhead": heads}
    made = dl.DepthLSTMTransformer(
        vocabulary, vocabulary, num_encoder_layers=LAYERS, num_decoder_layers=LAYERS, **sizes
    ).eval()
    with torch.no_grad():
        made.tgt_embedding.weight[made.eos_id] = 0
    return made


def decoding(place: Place, size: str, batch: int, beams: int) -> Problem:
    """Make the problem: the encoder and ``TOKENS`` steps of a search."""
    features, heads, vocabulary = SIZES[size]
    each = model(features, heads, vocabulary)
    source = torch.randint(4, vocabulary, (batch, SOURCE_LENGTH))
    packed = {dtype: dl.compile_decoder(each, dtype) for dtype in ("float32", *NARROW)}
    slow = in_pytorch(each)
    if slow.generate(source, TOKENS, beams).shape[1] != TOKENS:
        raise RuntimeError(f"the model stopped before {TOKENS} tokens")
    runs: Runs = {
        "eager": lambda: slow.generate(source, TOKENS, beams),
        **place.fused(lambda: packed["float32"].generate(source, TOKENS, beams)),
    }
    for dtype in NARROW:
        runs[dtype] = lambda dtype=dtype: packed[dtype].generate(source, TOKENS, beams)  # type: ignore[misc]
    search = "greedy" if beams == 1 else f"beam {beams}"
    row = Row("decode_engine", f"decode engine, batch {batch}, {search}", "fp32", f"{size} V={vocabulary}", "tokens/s")
    row.note = f"{SOURCE_LENGTH} tokens in, {TOKENS} out, encoder included; eager is generate() in PyTorch, fused cells"
    row.others = {dtype: f"compile_decoder({dtype!r})" for dtype in NARROW}
    positions = each.src_positions.table
    for name, kind in (("against", "float32"), ("rival_int8", "int8")):
        rival = ctranslate2_rival.translator(features, heads, LAYERS, vocabulary, positions, kind)
        if rival is None:
            row.missing = {"against": ctranslate2_rival.MISSING}
            break
        runs[name] = functools.partial(rival, source, TOKENS, beams)
    else:
        row.against = "CTranslate2, float32"
        row.others["rival_int8"] = "CTranslate2, int8"
    targets = [Target("eager", "speedup"), Target("against", "speedup")]
    return Problem(row, runs, targets, 1.5, grad=False, tokens=batch * TOKENS, place=place)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check the tokens of a small model against those of PyTorch in fp64, and their scores."""
    each = model(64, 4, 100)
    exact, source = copy.deepcopy(each).double(), torch.randint(4, 100, (3, 7))
    for beams in (1, 4):
        tokens, scores = each.generate(source, 12, beams, return_scores=True)
        backend = dl.last_backend() or "none"
        wanted, wanted_scores = exact.generate(source, 12, beams, return_scores=True)
        error = (scores - wanted_scores).abs().max().item() if torch.equal(tokens, wanted) else math.inf
        yield accuracy.Check("decode_engine", "fp32", error < 1e-5, f"{beams} beams", error, 0.0, error / 1e-5, backend)


SUBJECT = Subject(
    "decode_engine",
    {
        f"{size} batch {batch} beams {beams}": functools.partial(decoding, size=size, batch=batch, beams=beams)
        for size in SIZES
        for batch in (1, 8)
        for beams in (1, 4)
    },
    check,
    on_request=True,
)
