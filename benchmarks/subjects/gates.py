"""The gates alone, forward and forward + backward, against the bytes that have to move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure import accuracy, allocator
from ..measure.calls import Function, Runs, forward_and_backward, name_of
from ..measure.compiled import Compiled
from ..measure.place import Place
from ..measure.poison import poisoned
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

ROWS, FEATURES = 4096, 512
DTYPES = (torch.float32, torch.bfloat16)
FORWARD_ELEMENTS = 7  # in D a token: z (4) and c' read, h and c written
BACKWARD_ELEMENTS = 12  # z (4), c', dh and dc read, dz (4) and dc' written
# Operations on one feature of a token, as the formulas are written. An exponential, an error function and a division
# count as one each.
FORWARD_OPERATIONS = 49  # norm and affine 4 * 7, sigmoids 3 * 4, GELU 5, c and h 4
# all of the forward but h, gates and t 15, GELU's derivative 6, c' 1 and g 2 more, sums 4 * 3, dz 4 * 8
BACKWARD_OPERATIONS = 115
SPEEDUPS = (8.0, 3.5)  # over eager, over torch.compile
LARGE_ROWS = 32768  # tokens of a large batch, where fresh memory costs more than the kernels
LARGE_SPEEDUPS = {False: 3.5, True: 5.0}  # over torch.compile: of the forward, of forward + backward
SHARE_OF_COPY = {torch.float32: 0.80, torch.bfloat16: 0.60}  # of the forward
GPU_WIDTHS = (512, 1024, 2048)  # widths of a GPU's targets, in bf16
GPU_SPEEDUPS = {False: (6.0, 1.3), True: (6.0, 1.5)}  # of the forward, of forward + backward
GPU_SHARE_OF_COPY = 0.85
INPUTS = ("z", "c", "weight", "bias")
LAST_ROWS = 64


def reference_gates(z: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Call the reference gates by position."""
    return dl.reference.depth_lstm_gates(z, c, weight, bias)


def moved_bytes(rows: int, features: int, dtype: torch.dtype, elements: int) -> int:
    """Return the bytes of ``elements`` * D elements a token."""
    return rows * features * elements * dtype.itemsize


def operations(rows: int, features: int, backward: bool) -> int:
    """Return the operations of the forward, or of forward and backward.

    The package's kernels spend more, on polynomials for exp and erf.
    """
    return rows * features * (FORWARD_OPERATIONS + (BACKWARD_OPERATIONS if backward else 0))


def make_inputs(rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return random z (rows, 4D), c (rows, D), weight and bias (4, D), the affine near its initial value."""
    z, c = torch.randn(rows, 4 * features, device=device), torch.randn(rows, features, device=device)
    weight, bias = 1 + 0.1 * torch.randn(4, features, device=device), 0.1 * torch.randn(4, features, device=device)
    return [tensor.to(dtype) for tensor in (z, c, weight, bias)]


def copy_forward(z: Tensor, scratch: Tensor) -> Callable[[], object]:
    """Return a copy of as many bytes as the forward moves.

    3.5D a token are read and 3.5D written, 2D of them into outputs allocated afresh.
    """
    size = z.numel() // 4
    source, half = z.view(-1), size // 2

    def run() -> object:
        h, c = torch.empty(size, dtype=z.dtype), torch.empty(size, dtype=z.dtype)
        h.copy_(source[:size])
        c.copy_(source[size : 2 * size])
        scratch[: size + half].copy_(source[2 * size : 3 * size + half])
        return h, c

    return run


def copy_backward(z: Tensor, c: Tensor, dh: Tensor, scratch: Tensor) -> Callable[[], object]:
    """Return a copy of as many bytes as the backward moves.

    6D a token are read and 6D written, 5D of them into outputs allocated afresh.
    """

    def run() -> object:
        dz, dc = torch.empty_like(z), torch.empty_like(c)
        dz.copy_(z)
        dc.copy_(c)
        scratch[: dh.numel()].copy_(dh.view(-1))
        return dz, dc

    return run


def copy_once(source: Tensor, count: int) -> Callable[[], object]:
    """Return a copy of ``count`` elements of ``source``, in one kernel, into memory allocated afresh."""
    return lambda: torch.empty(count, dtype=source.dtype, device=source.device).copy_(source[:count])


def copies(place: Place, z: Tensor, c: Tensor, backward: bool) -> Callable[[], object]:
    """Return the floor; on a GPU one kernel a direction, because each launch would count."""
    if place.gpu:
        source = torch.randn(6 * c.numel(), device=z.device).to(z.dtype)
        elements = (FORWARD_ELEMENTS, BACKWARD_ELEMENTS) if backward else (FORWARD_ELEMENTS,)
        runs = [copy_once(source, c.numel() * count // 2) for count in elements]
    else:
        scratch = torch.empty(2 * c.numel(), dtype=z.dtype)
        runs = [copy_forward(z, scratch), *([copy_backward(z, c, torch.randn_like(c), scratch)] if backward else [])]
    return runs[0] if len(runs) == 1 else lambda: [run() for run in runs]


def targets(place: Place, rows: int, features: int, dtype: torch.dtype, backward: bool) -> list[Target]:
    """Return the targets.

    On a GPU the widths used in training have targets. Under torch.compile's own tuning there are none.
    """
    numbers: tuple[float | None, float | None, float | None] = (*SPEEDUPS, None if backward else SHARE_OF_COPY[dtype])
    if rows >= LARGE_ROWS:
        numbers = (None, LARGE_SPEEDUPS[backward], None)
    if place.gpu:
        named = features in GPU_WIDTHS and dtype == torch.bfloat16 and place.compiled.mode is None
        numbers = (*GPU_SPEEDUPS[backward], None if backward else GPU_SHARE_OF_COPY) if named else (None, None, None)
    kinds = (("eager", "speedup"), ("compile", "speedup"), ("against", "share"))
    return [Target(*kind, number) for kind, number in zip(kinds, numbers, strict=True)]


def last_rows(backend: str, inputs: list[Tensor]) -> accuracy.Check:
    """Compare the last rows of a gates call on ``inputs``, at their timed size, with fp64."""
    z, c, *affine = inputs
    count = min(LAST_ROWS, z.shape[0])
    with torch.no_grad(), poisoned(z.device):
        fused = [tensor[-count:] for tensor in dl.depth_lstm_gates(*inputs, backend=backend)]
        eager = reference_gates(z[-count:], c[-count:], *affine)
        exact = reference_gates(*(tensor.double() for tensor in (z[-count:], c[-count:], *affine)))
    made = accuracy.compare(
        "gates", z.dtype, ("last h", "last c"), exact, eager, fused, accuracy.GPU_ROUNDINGS[z.dtype]
    )
    return replace(made, size=f"N={z.shape[0]} D={c.shape[1]}")


def problem(place: Place, inputs: list[Tensor], runs: Runs, seconds: float, backward: bool) -> Problem:
    """Make a problem about the forward, or about forward and backward, without its floor."""
    rows, features = inputs[1].shape
    dtype, elements = inputs[0].dtype, FORWARD_ELEMENTS + (BACKWARD_ELEMENTS if backward else 0)
    name = ("gates forward + backward" if backward else "gates forward") + (
        ", max-autotune" if place.compiled.mode else ""
    )
    row = Row("gates", name, name_of(dtype), f"N={rows} D={features}", "ms", against=f"copy of {elements}D")
    row.missing, size = place.compiled.missing(), moved_bytes(rows, features, dtype, elements)
    row.note = f"{size / 1e6:.1f} MB moved"
    runs["against"] = copies(place, inputs[0], inputs[1], backward)
    return Problem(
        row,
        runs,
        targets(place, rows, features, dtype, backward),
        seconds,
        backward,
        moved_bytes=size,
        flops=operations(rows, features, backward),
        floor="against",
        place=place,
        verify=lambda backend: last_rows(backend, inputs),
    )


def forward(place: Place, dtype: torch.dtype = torch.float32, rows: int = ROWS, features: int = FEATURES) -> Problem:
    """Make the problem of the forward without gradients.

    If torch.compile tunes by its own mode, it is the only rival.
    """
    inputs = make_inputs(rows, features, dtype, place.device)
    with torch.no_grad():
        compiled = place.compiled.get(reference_gates, lambda function: function(*inputs))
    runs: Runs = {} if place.compiled.mode else {"eager": lambda: reference_gates(*inputs)}
    if compiled is not None:
        runs["compile"] = lambda: compiled(*inputs)
    runs |= {name: functools.partial(call, *inputs) for name, call in place.functions(dl.depth_lstm_gates).items()}
    return problem(place, inputs, runs, 0.7 if place.gpu else 1.2, backward=False)


def training(place: Place, dtype: torch.dtype = torch.float32, rows: int = ROWS, features: int = FEATURES) -> Problem:
    """Make the problem of forward and backward with the gradients of all inputs; rivals as in :func:`forward`."""
    inputs = make_inputs(rows, features, dtype, place.device)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    cotangents = [torch.randn_like(inputs[1]) for _ in range(2)]

    def step(function: Function) -> object:
        return forward_and_backward(function, leaves, cotangents)

    compiled = place.compiled.get(reference_gates, step)
    runs: Runs = {} if place.compiled.mode else {"eager": lambda: step(reference_gates)}
    if compiled is not None:
        runs["compile"] = lambda: step(compiled)
    runs |= {name: functools.partial(step, call) for name, call in place.functions(dl.depth_lstm_gates).items()}
    return problem(place, inputs, runs, 1.0 if place.gpu else 2.0, backward=True)


def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
    """Compile the rivals by making the problems."""
    for make in (forward, training):
        make(Place(compiled), dtype)
        if dtype == torch.float32:
            make(Place(compiled), dtype, LARGE_ROWS)


def large(make: Callable[..., Problem], kept: bool, place: Place) -> Problem:
    """Make the problem of a large batch, with memory as it is or kept."""
    found = make(place, rows=LARGE_ROWS)
    return found.keeping_memory() if kept else found


def check_at(
    dtype: torch.dtype,
    rows: int,
    features: int,
    backend: str = "",
    device: torch.device | str = "cpu",
    roundings: float = 1,
) -> accuracy.Check:
    """Check forward and every gradient at one size."""
    (fused,) = Place(backends=(backend,)).functions(dl.depth_lstm_gates).values()
    inputs = make_inputs(rows, features, dtype, device)
    return accuracy.function_check("gates", reference_gates, fused, inputs, INPUTS, dtype, roundings)


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    for rows, features in ((64, FEATURES), (17, 65)):
        yield check_at(dtype, rows, features)


SUBJECT = Subject(
    "gates",
    {
        f"{label} {name_of(dtype)}": functools.partial(make, dtype=dtype)
        for dtype in DTYPES
        for label, make in (("forward", forward), ("training", training))
    }
    | {
        f"{label} of a large batch{allocator.KEPT if kept else ''}": functools.partial(large, make, kept)
        for label, make in (("forward", forward), ("training", training))
        for kept in (False, True)
    },
    check,
    dtypes=DTYPES,
    compile=compile_all,
)
