"""One training step of an encoder layer (forward, backward, no optimizer).

The rival is PyTorch's own residual layer of equal parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy, matrix_products
from ..measure.calls import Runs, name_of, on_backend
from ..measure.matrix_products import matrix_entries
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

FEATURES, HEADS, BATCH, LENGTH = 512, 8, 16, 256
RESIDUAL = "nn.TransformerEncoderLayer"
RATIO = 0.95  # of the residual layer's time
LARGE_TOKENS, LARGE_RATIO = 32768, 0.80
COMPILED_DIFFERENCE = 0.02  # compiled against eager bf16, ||difference|| / ||eager||


def residual_layer(
    features: int = FEATURES, heads: int = HEADS, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.TransformerEncoderLayer:
    """Return torch's pre-norm layer; its matrices have 12 D^2 entries, as those of a depth-wise LSTM layer."""
    return nn.TransformerEncoderLayer(
        features,
        heads,
        4 * features,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        dtype=dtype,
        device=device,
    )


def depth_lstm_layers(
    features: int = FEATURES, heads: int = HEADS, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """Return the reference layer and the fused one with the same parameters."""
    eager = dl.reference.DepthLSTMEncoderLayer(
        features, heads, dropout=0.0, batch_first=True, dtype=dtype, device=device
    )
    fused = dl.DepthLSTMEncoderLayer(features, heads, dropout=0.0, batch_first=True, dtype=dtype, device=device)
    fused.load_state_dict(eager.state_dict())
    return {"eager": eager, "fused": fused}


def depth_lstm_step(layer: nn.Module, h: Tensor, c: Tensor, cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of both states and of every parameter.

    Both states go in and come out, as for a layer in the middle of a stack.
    """
    return torch.autograd.grad(layer(h, c), [h, c, *layer.parameters()], cotangents)


def difference(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Return the largest ||found - wanted|| / ||wanted|| of the pairs; NaN counts as infinite."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        norm = float(other.double().norm())
        error = float((one.double() - other.double()).norm()) / max(norm, 1e-30)
        worst = max(worst, error if error < float("inf") else float("inf"))
    return worst


def training(
    place: Place,
    dtype: torch.dtype = torch.float32,
    features: int = FEATURES,
    heads: int = HEADS,
    batch: int = BATCH,
    length: int = LENGTH,
    all_compiled: bool = False,
) -> Problem:
    """Make the problem: the step of a layer in the middle of a stack.

    With ``all_compiled`` torch.compile compiles all contestants.
    """
    device = place.device
    h, c = (torch.randn(batch, length, features, device=device).to(dtype).requires_grad_() for _ in range(2))
    cotangents = [torch.randn_like(h) for _ in range(2)]
    layers, residual = depth_lstm_layers(features, heads, dtype, device), residual_layer(features, heads, dtype, device)
    if matrix_entries(residual) != matrix_entries(layers["fused"]):
        found = f"{matrix_entries(residual)} and {matrix_entries(layers['fused'])} matrix entries"
        raise ValueError(f"layers of unequal size: {found}")

    def prepared(module: nn.Module) -> Callable[..., Any]:
        return torch.compile(module, dynamic=False) if all_compiled else module

    def stepping(module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        call, parameters = prepared(module), list(module.parameters())
        return lambda: torch.autograd.grad(call(h, c), [h, c, *parameters], cotangents)

    fused, rival, weights = stepping(layers["fused"]), prepared(residual), list(residual.parameters())
    runs: Runs = {"compile" if all_compiled else "eager": stepping(layers["eager"]), **place.fused(fused)}
    runs["against"] = lambda: torch.autograd.grad(rival(h), [h, *weights], cotangents[0])
    name, size = "encoder layer step" + (", all compiled" if all_compiled else ""), f"{batch}x{length} D={features}"
    row = Row("layer", name, name_of(dtype), size, "ms", against=RESIDUAL)
    row.note = f"{matrix_entries(residual) / 1e6:.2f}M matrix entries in each layer"
    needed = matrix_products.encoder_layer(batch, length, features, heads)
    if not place.gpu:
        runs["floor"] = matrix_products.training_run(needed, dtype, device)
        row.others = {"floor": "its bare products"}

    def compiled_check(backend: str) -> accuracy.Check:
        plain = on_backend(backend, lambda: depth_lstm_step(layers["fused"], h, c, cotangents))()
        error = difference(on_backend(backend, fused)(), plain)  # type: ignore[arg-type]
        passed = error <= COMPILED_DIFFERENCE
        return accuracy.Check(
            "layer", name_of(dtype), passed, "compiled against eager:", error, 0.0, 0.0, backend, size
        )

    ratio = LARGE_RATIO if batch * length >= LARGE_TOKENS and not place.gpu else RATIO
    targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", ratio)]
    return Problem(
        row,
        runs,
        targets,
        1.5 if place.gpu else 6.0,
        flops=matrix_products.training_flops(needed),
        floor="" if place.gpu else "floor",
        place=place,
        verify=compiled_check if all_compiled else None,
    )


def stack(place: Place, dtype: torch.dtype, features: int, heads: int, batch: int, length: int, layers: int) -> Problem:
    """Make the problem: a training step of a whole encoder, where each layer's input is written beside the state."""
    modules = depth_lstm_layers(features, heads, dtype, place.device)
    eager = dl.reference.DepthLSTMEncoder(modules["eager"], layers)  # type: ignore[arg-type]
    fused = dl.DepthLSTMEncoder(modules["fused"], layers)  # type: ignore[arg-type]
    fused.load_state_dict(eager.state_dict())
    residual = nn.TransformerEncoder(
        residual_layer(features, heads, dtype, place.device), layers, enable_nested_tensor=False
    )
    source = torch.randn(batch, length, features, device=place.device).to(dtype).requires_grad_()
    cotangent = torch.randn_like(source)

    def step(module: nn.Module) -> object:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.autograd.grad(module(source), [source, *parameters], cotangent, allow_unused=True)

    runs: Runs = {"eager": lambda: step(eager), **place.fused(lambda: step(fused)), "against": lambda: step(residual)}
    row = Row("layer", f"encoder of {layers} layers, step", name_of(dtype), f"{batch}x{length} D={features}", "ms")
    row.against = "nn.TransformerEncoder"
    targets = [Target("eager", "speedup"), Target("against", "ratio", RATIO)]
    flops = layers * matrix_products.training_flops(matrix_products.encoder_layer(batch, length, features, heads))
    return Problem(row, runs, targets, 1.5, flops=flops, place=place)


def check_at(
    dtype: torch.dtype,
    features: int,
    heads: int,
    tokens: tuple[int, int],
    backend: str = "",
    device: torch.device | str = "cpu",
    roundings: float = 1,
) -> accuracy.Check:
    """Check a layer on ``tokens`` (batch, length): forward and every gradient."""
    layers = depth_lstm_layers(features, heads, dtype, device)
    exact_layer = depth_lstm_layers(features, heads, torch.float64, device)["eager"]
    exact_layer.load_state_dict(layers["eager"].state_dict())
    tensors = [torch.randn(*tokens, features, device=device).to(dtype) for _ in range(4)]

    def run(module: nn.Module, to: torch.dtype) -> tuple[Tensor, ...]:
        h, c, *cotangents = [tensor.to(to) for tensor in tensors]
        h, c = h.requires_grad_(), c.requires_grad_()
        outputs = module(h, c)
        return (*outputs, *torch.autograd.grad(outputs, [h, c, *module.parameters()], cotangents))

    parameters = [f"gradient of {name}" for name, _ in layers["fused"].named_parameters()]
    names = ["h", "c", "gradient of h", "gradient of c", *parameters]
    exact, eager = run(exact_layer, torch.float64), run(layers["eager"], dtype)
    (fused,) = Place(backends=(backend,)).fused(lambda: run(layers["fused"], dtype)).values()
    return accuracy.compare("layer", dtype, names, exact, eager, fused(), roundings)  # type: ignore[arg-type]


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check a layer of a quarter of the timed width."""
    yield check_at(dtype, FEATURES // 4, HEADS, (2, 9))


SUBJECT = Subject("layer", {"encoder layer": training}, check)
