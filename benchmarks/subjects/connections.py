"""The tax of each depth connection: a training step of an encoder of six layers, in units of fused pre-norm.

All encoders but the depth-wise GRU's have as many matrix entries. Attention and feed-forward networks are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy
from ..measure.calls import Runs
from ..measure.kept import kept_bytes
from ..measure.matrix_products import matrix_entries
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

LAYERS, HEAD_FEATURES = 6, 64
TOKENS = {256: (8, 128), 512: (8, 64), 1024: (4, 32)}  # (batch, length) by width
COMPILED_WIDTH = 512  # a compilation takes half a minute, and the code is the same for each width
BASE = "pre-norm"
SECONDS = 2.0


def encoder(connection: str, features: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return an encoder without dropout around ``connection``."""
    heads = max(1, features // HEAD_FEATURES)
    return dl.Encoder(features, heads, LAYERS, dropout=0.0, batch_first=True, connection=connection, dtype=dtype)


def step(call: Callable[..., Tensor], module: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward with the gradients of the input and of all parameters."""
    return torch.autograd.grad(call(x), [x, *module.parameters()], cotangent)


def training(place: Place, connection: str, features: int) -> Problem:
    """Make the problem: the fused encoder, plain PyTorch's, that one compiled, and fused pre-norm."""
    batch, length = TOKENS[features]
    module, base = (encoder(name, features).to(place.device) for name in (connection, BASE))
    x = torch.randn(batch, length, features, device=place.device, requires_grad=True)
    cotangent = torch.randn_like(x)

    def plain(call: Callable[..., Tensor] = module) -> object:
        with dl.use_backend("reference"):
            return step(call, module, x, cotangent)

    runs: Runs = {"eager": plain}
    row = Row("connections", connection, "fp32", f"{batch}x{length} C={features}", "ms", against="fused pre-norm")
    if features == COMPILED_WIDTH:
        torch.compiler.reset()  # one code object serves all encoders, and torch compiles it for eight of them at most
        compiled = place.compiled.get(functools.partial(nn.Module.__call__, module), plain)
        if compiled is not None:
            runs["compile"] = functools.partial(plain, compiled)
        row.missing = place.compiled.missing()
    else:
        row.missing = {"compile": f"compiled at C={COMPILED_WIDTH} only"}
    runs |= place.fused(lambda: step(module, module, x, cotangent))
    runs["against"] = next(iter(place.fused(lambda: step(base, base, x, cotangent)).values()))
    kept = [kept_bytes(functools.partial(each, x), each.parameters()) / 1e6 for each in (module, base)]
    moved = module.connection.bytes_moved(batch * length) / 1e6  # type: ignore[operator, union-attr]
    row.note = (
        f"{matrix_entries(module) / 1e6:.1f}M matrix entries, {moved:.0f} MB moved by the connection forward, "
        f"{kept[0]:.0f} MB kept, {kept[0] / kept[1]:.2f} of pre-norm's"
    )
    row.numbers = {"connection_mb": moved, "kept_mb": kept[0], "kept_of_pre_norm": kept[0] / kept[1]}
    targets = [Target("eager", "speedup"), Target("compile", "speedup", 1.0), Target("against", "ratio")]
    return Problem(row, runs, targets, SECONDS, place=place)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    """Check output and all gradients of a narrow encoder of each connection; the bound allows one rounding a layer."""
    for connection in dl.connections.names():
        fused, exact = encoder(connection, 48, dtype), encoder(connection, 48, torch.float64)
        exact.load_state_dict(fused.state_dict())
        x, cotangent = torch.randn(2, 2, 9, 48).to(dtype)

        def run(module: nn.Module, to: torch.dtype, x: Any = x, cotangent: Any = cotangent) -> tuple[Tensor, ...]:
            leaf = x.to(to).requires_grad_()
            output = module(leaf)
            wanted = [leaf, *module.parameters()]
            return (output, *torch.autograd.grad(output, wanted, cotangent.to(to)))

        with dl.use_backend("reference"):
            eager, wanted = run(fused, dtype), run(exact, torch.float64)
        names = ["output", "gradient of x", *(f"gradient of {name}" for name, _ in fused.named_parameters())]
        yield accuracy.compare("connections", dtype, names, wanted, eager, run(fused, dtype), 2 * LAYERS)


SUBJECT = Subject(
    "connections",
    {
        f"{connection} {features}": functools.partial(training, connection=connection, features=features)
        for features in TOKENS
        for connection in dl.connections.names()
    },
    check,
    on_request=True,
)
