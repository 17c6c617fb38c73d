"""A training step of a language model (forward, loss, backward, no optimizer), beside pre-norm models of its size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy, call_cost
from ..measure.calls import Runs
from ..measure.matrix_products import matrix_entries
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

FEATURES, HEADS, KV_HEADS, LAYERS, VOCABULARY, BATCH, LENGTH = 256, 4, 2, 6, 2000, 8, 128
BASE = "pre-norm"
SECONDS = 60.0


def build(
    features: int = FEATURES,
    heads: int = HEADS,
    layers: int = LAYERS,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> dict[str, nn.Module]:
    """Return the models of examples/language_model: plain and fused with the depth-wise LSTM, and plain pre-norm.

    Pre-norm has a SwiGLU network in the place of the cells.
    """
    sizes: dict[str, Any] = {"kv_heads": KV_HEADS, "ffn": "swiglu", "norm": "rms", "dropout": 0.0, "max_len": length}
    shape = vocabulary, features, heads, layers
    eager, fused = (module.LanguageModel(*shape, **sizes) for module in (dl.reference, dl))
    fused.load_state_dict(eager.state_dict())
    return {"eager": eager, "fused": fused, "against": dl.reference.LanguageModel(*shape, connection=BASE, **sizes)}


def step(call: Callable[..., tuple[Tensor, Tensor]], model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the loss of predicting each next token, and the gradients of all parameters."""
    loss, _ = call(ids, labels=ids)
    return (loss, *torch.autograd.grad(loss, list(model.parameters())))


def training(place: Place) -> Problem:
    """Make the problem: all models on the same batch, the plain ones also compiled."""
    models = {name: module.to(place.device) for name, module in build().items()}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), device=place.device)
    runs: Runs = {"eager": lambda: step(models["eager"], models["eager"], ids)}
    for name, source in (("compile", "eager"), ("compiled_base", "against")):
        module = models[source]

        def run(call: Callable[..., Any], module: nn.Module = module) -> object:
            return step(call, module, ids)

        compiled = place.compiled.get(functools.partial(nn.Module.__call__, module), run)
        if compiled is not None:
            runs[name] = functools.partial(run, compiled)
    runs |= place.fused(lambda: step(models["fused"], models["fused"], ids))
    runs["against"] = lambda: step(models["against"], models["against"], ids)
    size = f"{BATCH}x{LENGTH} d={FEATURES} {LAYERS} layers V={VOCABULARY}"
    row = Row("language_model", "language model training step", "fp32", size, "tokens/s", against=f"{BASE}, eager")
    row.others, row.missing = {"compiled_base": f"{BASE}, compiled"}, place.compiled.missing()
    entries = [matrix_entries(models[name]) / 1e6 for name in ("fused", "against")]
    row.note = f"{entries[0]:.2f}M matrix entries, {entries[1]:.2f}M in {BASE}; no optimizer"
    if not place.gpu:
        row.numbers = {f"{name}_peak_mb": call_cost.of_call(each).peak_bytes / 1e6 for name, each in runs.items()}
    columns = {"eager": "speedup", "compile": "speedup", "against": "ratio", "compiled_base": "ratio"}
    targets = [Target(column, kind) for column, kind in columns.items()]
    return Problem(row, runs, targets, SECONDS, tokens=BATCH * LENGTH, place=place)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check loss and all gradients of a small model on one batch; the bound allows one rounding a layer."""
    layers = 2
    models, exact_models = (build(32, 4, layers, 50, 9) for _ in range(2))
    exact, ids = exact_models["eager"].double(), torch.randint(3, 50, (2, 9))
    exact.load_state_dict(models["eager"].state_dict())
    names = ["loss", *(f"gradient of {name}" for name, _ in models["fused"].named_parameters())]
    contestants = exact, models["eager"].to(dtype), models["fused"].to(dtype)
    wanted, eager, fused = (step(module, module, ids) for module in contestants)
    yield accuracy.compare("language_model", dtype, names, wanted, eager, fused, 2 * layers)


SUBJECT = Subject("language_model", {"training": training}, check, on_request=True)
