"""Searches whose products are shared with helpers: no bit changes, whoever runs beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_helpers import sharpen
from helpers import needs_cpp
from test_robustness import run
from torch import Tensor

import depthlstm_fast as dl

pytestmark = needs_cpp
TASKS = Path("/proc/self/task")
needs_tasks = pytest.mark.skipif(not TASKS.exists() or not hasattr(os, "SCHED_IDLE"), reason="needs Linux's threads")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def translation_model() -> Any:
    """Its products are large enough for helpers: those of 8 rows take some 5 us."""
    torch.manual_seed(0)
    made = dl.DepthLSTMTransformer(300, 333, d_model=128, nhead=4, num_encoder_layers=1, num_decoder_layers=2)
    sharpen(made)
    return made.eval()


def sources(batch: int = 8, length: int = 40) -> Tensor:
    src = torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(1))
    for row in range(1, batch):
        src[row, 7 + 4 * row :] = 0
    return src


def same(found: Any, wanted: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("beams", [1, 3])
def test_threads_change_no_bit(dtype: Any, beams: int) -> None:
    served, src = dl.compile_decoder(translation_model(), dtype), sources()
    torch.set_num_threads(1)
    wanted = served.generate(src, 30, beams, return_scores=True)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert same(served.generate(src, 30, beams, return_scores=True), wanted)


HELPERS = """
import os, time, torch, depthlstm_fast as dl
from test_team import sources, translation_model

def helpers():
    return sum(os.sched_getscheduler(int(task)) == os.SCHED_IDLE for task in os.listdir("/proc/self/task"))

served, src = dl.compile_decoder(translation_model()), sources()
for threads in (1, 3, 2, 3):
    torch.set_num_threads(threads)
    served.generate(src, 3)
    end = time.monotonic() + 60
    while threads > 1 and helpers() < 2 and time.monotonic() < end:
        time.sleep(0.01)  # a thread gives itself the priority when it first runs
    print(helpers())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_row_is_left_alone(dtype: Any) -> None:
    """A product of more rows than a helper has room for is cut: one row alone would have sums of another order."""
    served, src = dl.compile_decoder(translation_model(), dtype), torch.randint(3, 300, (513, 3))
    src[7] = 0  # of padding alone
    torch.set_num_threads(1)
    wanted = served.generate(src, 4, return_scores=True)
    torch.set_num_threads(2)
    for _ in range(3):
        assert same(served.generate(src, 4, return_scores=True), wanted)


@needs_tasks
def test_helpers_have_the_lowest_priority_and_stay() -> None:
    """Whether they run is the system's affair, which tests/cpp/smoke_team.cpp waits for."""
    done = run(HELPERS)
    assert done.stdout.split() == ["0", "2", "2", "2"], done.stderr


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_prompts_of_language_models(kv_heads: int) -> None:
    """A prompt's heads are shared, or parts of a group of heads; lengths are no multiples of a block of keys."""
    torch.manual_seed(0)
    made = dl.LanguageModel(300, d_model=128, nhead=4, num_layers=2, kv_heads=kv_heads, max_len=700, eos_id=None).eval()
    ids, mask = torch.randint(3, 300, (3, 601)), torch.ones(3, 601, dtype=torch.bool)
    mask[1, :77] = mask[2, :550] = False
    served = dl.compile_decoder(made)
    torch.set_num_threads(1)
    wanted = served.generate(ids, 20, attention_mask=mask, return_scores=True)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert same(served.generate(ids, 20, attention_mask=mask, return_scores=True), wanted)


def test_beside_busy_programs() -> None:
    """Helpers hardly run then, and are stopped anywhere."""
    served, src = dl.compile_decoder(translation_model()), sources()
    torch.set_num_threads(1)
    wanted = served.generate(src, 30, 2, return_scores=True)
    torch.set_num_threads(3)
    command = [sys.executable, "-c", "import time; end = time.time() + 60\nwhile time.time() < end: pass"]
    busy = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for _ in range(20):
            assert same(served.generate(src, 30, 2, return_scores=True), wanted)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_several_searches_at_once() -> None:
    """One of them gets the helpers, and the others go on alone."""
    served, src = dl.compile_decoder(translation_model(), "int8"), sources()
    torch.set_num_threads(2)
    wanted = served.generate(src, 30, 2, return_scores=True)
    start, wrong = threading.Barrier(4), []

    def search() -> None:
        start.wait()
        wrong.extend(_ for _ in range(10) if not same(served.generate(src, 30, 2, return_scores=True), wanted))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, sys, torch, depthlstm_fast as dl
from test_team import same, sources, translation_model

served, src = dl.compile_decoder(translation_model()), sources()
torch.set_num_threads(2)
wanted = served.generate(src, 30, return_scores=True)
child = os.fork()
if child == 0:
    found = [served.generate(src, 30, return_scores=True) for _ in range(5)]
    os._exit(7 if all(same(each, wanted) for each in found) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert same(served.generate(src, 30, return_scores=True), wanted)
sys.exit(status)
"""


def test_a_forked_child_has_helpers_of_its_own() -> None:
    done = run(FORK)
    assert done.returncode == 7, done.stderr


SOAK = """
import torch, depthlstm_fast as dl
from test_team import sources, translation_model

served, src = dl.compile_decoder(translation_model()), sources()
torch.set_num_threads(3)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

sizes = []
for number in range(250):
    served.generate(src, 12, 1 + number % 3)
    if number % 10 == 9:
        sizes.append(resident())
print(*sizes)
"""


@needs_tasks
def test_memory_does_not_grow_with_the_searches() -> None:
    """Searches that were kept would be 1 MB each, and 200 MB in all."""
    done = run(SOAK, MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    sizes = list(map(int, done.stdout.split()))
    assert max(sizes[5:]) - sizes[4] < 16 << 20, sizes
