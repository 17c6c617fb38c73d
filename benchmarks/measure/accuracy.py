"""Correct before fast: every subject is held to the fp64 reference, at a small size, before it is timed.

The bound: a fused result may be twice as far from fp64 as PyTorch's own eager result of the same dtype, and one rounding more.
Cotangents are random; a sum's constant ones would make a LayerNorm's input gradient zero and test nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..subjects import cell, decoding, gates, layer, model
from .compiled import reference_cell, reference_gates

BACKEND = "cpp"


@dataclass(frozen=True)
class Check:
    """One comparison: the tensor that came closest to its bound, or went beyond it.

    Attributes:
        used: its error over its bound; at most 1 where the check is green.
        size: where it matters, at which sizes.
    """

    subject: str
    dtype: str
    passed: bool
    tensor: str
    error: float
    eager_error: float
    used: float
    backend: str
    size: str = ""

    @property
    def summary(self) -> str:
        verdict = "green" if self.passed else "RED"
        return f"{verdict}: {self.tensor} error {self.error:.1e} (eager {self.eager_error:.1e}), {self.used:.0%} of the bound"


def compare(
    subject: str,
    dtype: torch.dtype,
    names: Sequence[str],
    exact: Sequence[Tensor],
    eager: Sequence[Tensor],
    fused: Sequence[Tensor],
    roundings: float = 1,
) -> Check:
    """Hold ``fused`` to 2 * (error of ``eager``) + ``roundings`` of the largest value, tensor by tensor, against ``exact`` (fp64)."""
    worst: tuple[float, str, float, float] = (-1.0, "", 0.0, 0.0)
    for name, wanted, plain, found in zip(names, exact, eager, fused, strict=True):
        wanted, plain, found = wanted.detach(), plain.detach().double(), found.detach().double()
        tiny = roundings * torch.finfo(dtype).eps * float(wanted.abs().max())
        error = float((found - wanted).abs().max())
        plain_error = float((plain - wanted).abs().max())
        # a NaN or an infinity compares false with everything: it must count as beyond the bound
        used = error / (2 * plain_error + tiny) if error < float("inf") else float("inf")
        if used > worst[0]:
            worst = (used, name, error, plain_error)
    used, name, error, plain_error = worst
    return Check(subject, gates.name_of(dtype), used <= 1, name, error, plain_error, used, dl.last_backend() or "none")


def function_check(
    subject: str,
    reference: gates.Function,
    fused: gates.Function,
    inputs: list[Tensor],
    names: Sequence[str],
    dtype: torch.dtype,
    roundings: float = 1,
) -> Check:
    """h, c and the gradient of each of ``inputs``, which are called ``names``, under random cotangents."""
    cotangents = [torch.randn_like(inputs[1]) for _ in range(2)]

    def run(function: gates.Function, to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(to).requires_grad_() for tensor in inputs]
        return gates.forward_and_backward(function, leaves, [tensor.to(to) for tensor in cotangents])

    labels = ["h", "c", *(f"gradient of {name}" for name in names)]
    exact, eager = run(reference, torch.float64), run(reference, dtype)
    return compare(subject, dtype, labels, exact, eager, run(fused, dtype), roundings)


def check_gates(dtype: torch.dtype) -> Iterator[Check]:
    for rows, features in ((64, gates.FEATURES), (17, 65)):
        inputs = gates.make_inputs(rows, features, dtype)
        yield function_check("gates", reference_gates, dl.depth_lstm_gates, inputs, ("z", "c", "weight", "bias"), dtype)


def check_cell(dtype: torch.dtype) -> Iterator[Check]:
    names = ("x", "h", "c", "w", "b", "weight", "bias")
    for rows, features in ((64, cell.FEATURES), (17, 65)):
        yield function_check("cell", reference_cell, dl.depth_lstm_cell, cell.make_inputs(rows, features, dtype), names, dtype)


def check_layer(dtype: torch.dtype) -> Iterator[Check]:
    """A layer of a quarter of the timed width."""
    yield layer_check(layer.FEATURES // 4, layer.HEADS, (2, 9), dtype)


def layer_check(
    features: int, heads: int, tokens: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu", roundings: float = 1
) -> Check:
    """A layer on ``tokens`` (batch, length); forward and every gradient."""
    layers = layer.depth_lstm_layers(features, heads, dtype, device)
    exact_layer = layer.depth_lstm_layers(features, heads, torch.float64, device)["eager"]
    exact_layer.load_state_dict(layers["eager"].state_dict())
    tensors = [torch.randn(*tokens, features, device=device).to(dtype) for _ in range(4)]

    def run(module: torch.nn.Module, to: torch.dtype) -> tuple[Tensor, ...]:
        h, c, *cotangents = [tensor.to(to) for tensor in tensors]
        h, c = h.requires_grad_(), c.requires_grad_()
        outputs = module(h, c)
        return (*outputs, *torch.autograd.grad(outputs, [h, c, *module.parameters()], cotangents))

    names = ["h", "c", "gradient of h", "gradient of c", *(f"gradient of {name}" for name, _ in layers["fused"].named_parameters())]
    exact, eager = run(exact_layer, torch.float64), run(layers["eager"], dtype)
    return compare("layer", dtype, names, exact, eager, run(layers["fused"], dtype), roundings)


def check_decoding(dtype: torch.dtype) -> Iterator[Check]:
    """Logits of a small model in ``dtype``, and in fp64, where no two logits are close, the very tokens."""
    exact, models = decoding.build(64, 2, 100, torch.float64), decoding.build(64, 2, 100, dtype)
    for name, module in models.items():
        module.load_state_dict(models["eager"].state_dict())
        exact[name].load_state_dict(models["eager"].state_dict())
    source, target = torch.randint(3, 100, (3, 7)), torch.randint(3, 100, (3, 9))
    with torch.no_grad():
        logits = {name: module(source, target) for name, module in models.items()}
        for name in ("fused", "folded"):
            yield compare("decoding", dtype, [f"{name} logits"], [exact["eager"](source, target)], [logits["eager"]], [logits[name]])
        tokens = {name: decoding.greedy(module, source, 12) for name, module in exact.items()}
    for name in ("fused", "folded"):
        same = torch.equal(tokens[name], tokens["eager"])
        yield Check("decoding", "fp64", same, f"{name} tokens", float(not same), 0.0, float(not same), dl.last_backend() or "none")


def check_model(dtype: torch.dtype) -> Iterator[Check]:
    """Loss and all gradients of a small model on one batch; the bound allows a rounding for each of its layers."""
    layers = 2
    models, exact_models = (model.build(32, 4, layers, 50) for _ in range(2))
    exact = exact_models["eager"].double()
    exact.load_state_dict(models["eager"].state_dict())
    source, target = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 8))
    names = ["loss", *(f"gradient of {name}" for name, _ in models["fused"].named_parameters())]
    wanted, eager, fused = (model.step(module, source, target) for module in (exact, models["eager"].to(dtype), models["fused"].to(dtype)))
    yield compare("model", dtype, names, wanted, eager, fused, 2 * layers)


CHECKS: dict[str, tuple[Callable[[torch.dtype], Iterator[Check]], tuple[torch.dtype, ...]]] = {
    "gates": (check_gates, gates.DTYPES),
    "cell": (check_cell, gates.DTYPES),
    "layer": (check_layer, (torch.float32,)),
    "model": (check_model, (torch.float32,)),
    "decoding": (check_decoding, (torch.float32,)),
}
# which checks a subject's rows stand on
NEEDED = {
    "gates": ("gates",),
    "overhead": ("gates",),
    "cell": ("cell",),
    "layer": ("layer",),
    "model": ("model",),
    "scaling": ("gates", "layer"),
    "memory": ("cell", "layer"),
    "decoding": ("decoding",),
    "translation": ("layer", "decoding"),
}


def run_checks(subjects: Sequence[str], tick: Callable[[], None] = lambda: None) -> list[Check]:
    """All checks that ``subjects`` need; a check whose call did not run on the compiled backend is red."""
    wanted = dict.fromkeys(name for subject in subjects for name in NEEDED[subject])
    found = []
    for name in wanted:
        function, dtypes = CHECKS[name]
        for dtype in dtypes:
            for check in function(dtype):
                if check.backend != BACKEND:
                    check = replace(check, passed=False, tensor=f"ran on {check.backend}, not {BACKEND}:")
                found.append(check)
            tick()
    return found


def failure(checks: Sequence[Check], subject: str) -> str | None:
    """Why no number of ``subject`` may be shown; None where all it stands on is green."""
    red = [check for check in checks if check.subject in NEEDED[subject] and not check.passed]
    return "; ".join(f"{check.subject} {check.dtype} {check.summary}" for check in red) or None


def error_numbers(checks: Sequence[Check], subject: str, dtype: str) -> dict[str, float]:
    """What the row of a subject and dtype says about its error against fp64: of its checks the one nearest to its bound."""
    own = [check for check in checks if check.subject in NEEDED[subject] and check.dtype == dtype]
    if not own:
        return {}
    worst = max(own, key=lambda check: check.used)
    return {"error": worst.error, "eager_error": worst.eager_error, "bound_share": worst.used}
