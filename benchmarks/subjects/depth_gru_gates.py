"""The gates of the depth-wise GRU, with a LayerNorm on each gate and without, against the bytes that have to move.

Every row keeps memory (``dl.keep_memory()``): outputs of this size are otherwise page faults more than anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure import accuracy
from ..measure.calls import Runs, name_of
from ..measure.compiled import Compiled
from ..measure.place import CPU, IN_USE, Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

NAME = "depth_gru_gates"
SHAPES = ((8192, 512), (4096, 1024))  # rows, features
DTYPES = (torch.float32, torch.bfloat16)
FORWARD_ELEMENTS = 6  # in C a token: z (4) and h read, h' written
BACKWARD_ELEMENTS = 11  # z (4), h and dh' read, dz (4) and dh written
SHARE_OF_COPY = {torch.float32: 0.80, torch.bfloat16: 0.60}  # of the forward
SPEEDUPS = {False: 1.0, True: 2.0}  # over torch.compile: of the forward, of forward + backward
INPUTS = ("z", "h", "weight", "bias")
Gates = Callable[..., Tensor]


def reference_gates(*tensors: Tensor) -> Tensor:
    return dl.reference.depth_gru_gates(*tensors)


def fused_gates(*tensors: Tensor, backend: str | None = None) -> Tensor:
    if backend is None:
        return dl.depth_gru_gates(*tensors)
    with dl.use_backend(backend):
        return dl.depth_gru_gates(*tensors)


def make_inputs(
    rows: int, features: int, dtype: torch.dtype, normed: bool, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Return random z (rows, 4C) and h (rows, C), and with ``normed`` an affine (4, C) near its initial value."""
    made = [torch.randn(rows, 4 * features, device=device), torch.randn(rows, features, device=device)]
    if normed:
        made += [1 + 0.1 * torch.randn(4, features, device=device), 0.1 * torch.randn(4, features, device=device)]
    return [tensor.to(dtype) for tensor in made]


def step(function: Gates, leaves: list[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Return h' and the gradients of all ``leaves``."""
    h_out = function(*leaves)
    return (h_out, *torch.autograd.grad(h_out, leaves, cotangent))


def copies(like: Tensor, elements: list[int]) -> Callable[[], object]:
    """Return copies of as many bytes as each direction moves: half of its ``elements`` are read, half are written."""
    counts = [like.numel() * count // 2 for count in elements]
    source = torch.randn(max(counts), device=like.device).to(like.dtype)
    return lambda: [torch.empty_like(source[:count]).copy_(source[:count]) for count in counts]


def problem(place: Place, shape: tuple[int, int], dtype: torch.dtype, normed: bool, backward: bool) -> Problem:
    """Make the problem of the forward without gradients, or of forward and backward with those of all inputs."""
    rows, features = shape
    inputs = make_inputs(rows, features, dtype, normed, place.device)
    cotangent = torch.randn_like(inputs[1])
    if backward:
        inputs = [tensor.requires_grad_() for tensor in inputs]

    def run(function: Gates) -> object:
        return step(function, inputs, cotangent) if backward else function(*inputs)

    with torch.set_grad_enabled(backward):
        compiled = place.compiled.get(reference_gates, run)
    runs: Runs = {"eager": lambda: run(reference_gates)}
    if compiled is not None:
        runs["compile"] = lambda: run(compiled)
    runs |= {name: functools.partial(run, call) for name, call in place.functions(fused_gates).items()}
    elements = [FORWARD_ELEMENTS, BACKWARD_ELEMENTS] if backward else [FORWARD_ELEMENTS]
    runs["against"] = copies(inputs[1].detach(), elements)
    name = f"GRU gates{', LayerNorm' if normed else ''}: forward{' + backward' if backward else ''}"
    row = Row(NAME, name, name_of(dtype), f"N={rows} C={features}", "ms", against=f"copy of {sum(elements)}C")
    row.missing, size = place.compiled.missing(), rows * features * sum(elements) * dtype.itemsize
    row.note = f"{size / 1e6:.1f} MB moved"
    targets = [
        Target("eager", "speedup"),
        Target("compile", "speedup", SPEEDUPS[backward]),
        Target("against", "share", None if backward else SHARE_OF_COPY[dtype]),
    ]
    made = Problem(
        row, runs, targets, 2.0 if backward else 1.2, backward, moved_bytes=size, floor="against", place=place
    )
    return made.keeping_memory()


def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
    """Compile the rivals by making the problems."""
    for make in PROBLEMS.values():
        if make.keywords["dtype"] == dtype:
            make(Place(compiled))


def check_at(
    normed: bool,
    dtype: torch.dtype,
    rows: int,
    features: int,
    backend: str = IN_USE,
    device: torch.device = CPU,
    roundings: float = 1,
) -> accuracy.Check:
    """Compare h' and every gradient with fp64."""
    inputs = make_inputs(rows, features, dtype, normed, device)
    cotangent = torch.randn_like(inputs[1])

    def results(function: Gates, to: torch.dtype) -> list[Tensor]:
        return list(step(function, [tensor.to(to).requires_grad_() for tensor in inputs], cotangent.to(to)))

    labels = ["h'", *(f"gradient of {name}" for name in INPUTS[: len(inputs)])]
    exact, eager = results(reference_gates, torch.float64), results(reference_gates, dtype)
    found = results(functools.partial(fused_gates, backend=backend or None), dtype)
    return accuracy.compare(NAME, dtype, labels, exact, eager, found, roundings)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    for (rows, features), normed in (((64, 512), True), ((17, 65), False)):
        yield check_at(normed, dtype, rows, features)


PROBLEMS = {
    f"{'training' if backward else 'forward'} {name_of(dtype)} N={shape[0]}{' LayerNorm' if normed else ''}": (
        functools.partial(problem, shape=shape, dtype=dtype, normed=normed, backward=backward)
    )
    for normed in (False, True)
    for dtype in DTYPES
    for shape in SHAPES
    for backward in (False, True)
}
SUBJECT = Subject(NAME, PROBLEMS, check, dtypes=DTYPES, compile=compile_all, on_request=True)
