"""A language model in the decode engine against the same search in PyTorch."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

import depthlstm_fast as dl

from ..measure import accuracy
from ..measure.calls import Runs
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target
from .decode_engine import NARROW
from .decoding import in_pytorch

FEATURES, HEADS, LAYERS, VOCABULARY = 256, 4, 8, 8000
PROMPT, TOKENS = 16, 64
LONG_PROMPTS = (512, 2048)  # with one token behind them
CONNECTIONS = ("depth-lstm", "pre-norm")


def model(connection: str, features: int = FEATURES, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Any:
    """Return a model that never ends: no token is its eos."""
    sizes: dict[str, Any] = {"connection": connection, "max_len": LONG_PROMPTS[-1] + 1, "eos_id": None}
    return dl.LanguageModel(vocabulary, features, HEADS, layers, **sizes).eval()


def generation(place: Place, connection: str, batch: int, prompt: int = PROMPT, tokens: int = TOKENS) -> Problem:
    """Make the problem: the prompts and ``tokens`` greedy steps."""
    each = model(connection)
    prompts = torch.randint(3, VOCABULARY, (batch, prompt))
    packed = {dtype: dl.compile_decoder(each, dtype) for dtype in ("float32", *NARROW)}
    slow = in_pytorch(each)
    runs: Runs = {
        "eager": lambda: slow.generate(prompts, tokens),
        **place.fused(lambda: packed["float32"].generate(prompts, tokens)),
    }
    for dtype in NARROW:
        runs[dtype] = lambda dtype=dtype: packed[dtype].generate(prompts, tokens)  # type: ignore[misc]
    size = f"d={FEATURES} {LAYERS} layers V={VOCABULARY}"
    label = f"batch {batch}, greedy" if prompt == PROMPT else f"a prompt of {prompt}"
    row = Row("causal_engine", f"language model, {connection}, {label}", "fp32", size, "tokens/s")
    row.note = f"{prompt} tokens in, {tokens} out, prompts included; eager is generate() in PyTorch, fused kernels"
    row.others = {dtype: f"compile_decoder({dtype!r})" for dtype in NARROW}
    return Problem(row, runs, [Target("eager", "speedup")], 1.5, grad=False, tokens=batch * tokens, place=place)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check the tokens of small models against those of PyTorch in fp64, and their scores."""
    for connection in CONNECTIONS:
        each = model(connection, 64, 2, 100)
        exact, prompts = copy.deepcopy(each).double(), torch.randint(4, 100, (3, 7))
        tokens, scores = each.generate(prompts, 12, return_scores=True)
        backend = dl.last_backend() or "none"
        wanted, wanted_scores = exact.generate(prompts, 12, return_scores=True)
        error = (scores - wanted_scores).abs().max().item() if torch.equal(tokens, wanted) else math.inf
        yield accuracy.Check("causal_engine", "fp32", error < 1e-5, connection, error, 0.0, error / 1e-5, backend)


SUBJECT = Subject(
    "causal_engine",
    {
        f"{connection} batch {batch}": functools.partial(generation, connection=connection, batch=batch)
        for connection in CONNECTIONS
        for batch in (1, 8)
    }
    | {
        f"depth-lstm prompt {prompt}": functools.partial(
            generation, connection="depth-lstm", batch=1, prompt=prompt, tokens=1
        )
        for prompt in LONG_PROMPTS
    },
    check,
    on_request=True,
)
