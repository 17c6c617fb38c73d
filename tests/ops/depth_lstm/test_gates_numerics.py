"""Large sizes and threads of the C++ kernels: results do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import (
    BF16,
    MAIN_TYPES,
    Types,
    arguments,
    assert_identical,
    cotangents,
    fused,
    needs_cpp,
    results,
)
from torch import Tensor

pytestmark = needs_cpp


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Two threads share 300 rows of 512 in both passes. 4096 rows of 7 give chunks of 64 rows, more than one to a thread.
@pytest.mark.parametrize(("rows", "features"), [(300, 512), (4096, 7), (2049, 33)])
@pytest.mark.parametrize("types", [MAIN_TYPES[0], MAIN_TYPES[2]], ids=str)
@pytest.mark.usefixtures("threads")
def test_threads_change_nothing(types: Types, rows: int, features: int) -> None:
    tensors, options = arguments(rows, features, types)
    options.update(dropout_p=0.2, training=True, seed=torch.tensor([11]))
    grads = cotangents(tensors)
    torch.set_num_threads(1)
    alone = results(fused, tensors, grads, **options)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_identical(results(fused, tensors, grads, **options), alone)


@pytest.mark.usefixtures("threads")
def test_twenty_runs_are_identical() -> None:
    torch.set_num_threads(2)
    tensors, options = arguments(300, 512, MAIN_TYPES[0])
    grads = cotangents(tensors)
    first = results(fused, tensors, grads, **options)
    for _ in range(19):
        assert_identical(results(fused, tensors, grads, **options), first)


def _memory_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_more_than_2_to_the_31_elements(backward: bool) -> None:
    """Check a z of 2^31 + 2^17 elements.

    An int32 offset would wrap, and read or write the first rows in place of the last ones.
    """
    features = 4096
    rows = 2**31 // (4 * features) + 8
    need = rows * features * 2 * (12 if backward else 7) + 2 * 2**30
    if _memory_available() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of memory")
    # The first and last rows, and those about 2^29, 2^30 and 2^31 elements, are random. The rows between are zeros,
    # which are cheap to make.
    marks = [0, *(2**power // (4 * features) for power in (29, 30, 31)), rows - 4]
    chosen = torch.tensor(sorted({row for mark in marks for row in range(max(mark - 3, 0), min(mark + 4, rows))}))
    tensors, options = arguments(len(chosen), features, Types(BF16, BF16, BF16), affine=False)
    grads = cotangents(tensors)

    def scattered(x: Tensor) -> Tensor:
        whole = torch.zeros(rows, x.shape[1], dtype=x.dtype)
        whole[chosen] = x
        return whole

    z, c = (scattered(tensors[name]).requires_grad_(backward) for name in ("z", "c"))
    found = dict(zip(("h", "c_out"), fused(z, c, **options), strict=True))
    if backward:
        gradients = torch.autograd.grad(tuple(found.values()), [z, c], tuple(map(scattered, grads)))
        found.update(zip(("dz", "dc"), gradients, strict=True))
    wanted = results(fused, tensors, grads, **options)
    assert_identical(
        {name: value.detach()[chosen] for name, value in found.items()}, {name: wanted[name] for name in found}
    )
