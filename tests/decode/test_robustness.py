"""The engine among threads, after a fork, in strict mode, and over thousands of sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from decode_helpers import draw
from helpers import needs_cpp

import depthlstm_fast as dl

pytestmark = needs_cpp
HERE = Path(__file__).resolve().parent


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a process of its own, which may hang or grow."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(Path(dl.__file__).resolve().parents[1])])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_engines_in_several_threads_at_once() -> None:
    """Three engines in six threads, two for each: every search is that of an engine alone."""
    cases = [draw(seed) for seed in (3, 5, 8)]
    dtypes = ("float32", "bfloat16", "int8")
    served = [dl.compile_decoder(case.model, dtype) for case, dtype in zip(cases, dtypes, strict=True)]
    wanted = [case.generate(each) for case, each in zip(cases, served, strict=True)]
    start, wrong = threading.Barrier(6), []

    def search(index: int) -> None:
        start.wait()
        for _ in range(40):
            found = cases[index].generate(served[index])
            if not all(torch.equal(a, b) for a, b in zip(found, wanted[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=search, args=(number % 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_model_generates_in_several_threads_while_it_is_packed() -> None:
    """The copy is made by whichever thread comes first, and by several at once."""
    case, start, found = draw(11), threading.Barrier(4), []

    def search() -> None:
        start.wait()
        found.extend(case.generate() for _ in range(5))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0], strict=True))


FORK = """
import os, sys, torch, depthlstm_fast as dl
from decode_helpers import draw

case = draw(3)
served = dl.compile_decoder(case.model)
torch.set_num_threads(3)
wanted = case.generate(), case.generate(served)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # OpenMP's threads stayed with the parent
    found = case.generate(), case.generate(served)
    os._exit(7 if all(torch.equal(f[0], w[0]) for f, w in zip(found, wanted)) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(case.generate(served)[0], wanted[1][0])
sys.exit(status)
"""


def test_a_forked_child_decodes() -> None:
    done = run(FORK)
    assert done.returncode == 7, done.stderr


SOAK = """
import random, sys, torch, depthlstm_fast as dl
from test_operators import model

each, r = model(), random.Random(0)
served = [dl.compile_decoder(each, dtype) for dtype in ("float32", "bfloat16", "int8")] + [each]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

done, sizes = 0, []
while done < int(sys.argv[1]):
    batch = r.randint(1, 8)
    src = torch.randint(3, 30, (batch, r.randint(1, 16)))
    r.choice(served).generate(src, r.randint(1, 16), r.choice((1, 1, 2, 4)))
    done += batch
    if done // 500 > len(sizes):
        sizes.append(resident())
print(*sizes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("sentences", [3000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_sentences(sentences: int) -> None:
    """A search's state that was kept would be 240 KB a batch, and 27 MB in 500 sentences."""
    done = run(SOAK.replace("sys.argv[1]", repr(str(sentences))), MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    sizes = list(map(int, done.stdout.split()))
    assert len(sizes) >= sentences // 500 - 1
    assert max(sizes) - sizes[0] < 1 << 20, sizes


STRICT = """
import torch, depthlstm_fast as dl
from decode_helpers import draw

case, calls = draw(3), []
wanted = case.generate()
assert dl.last_backend() == "cpp"
case.model.decoder.register_forward_hook(lambda *given: calls.append(1))
for layer in case.model.modules():
    if isinstance(layer, torch.nn.LayerNorm):
        layer.register_forward_hook(lambda *given: calls.append(1))
found = case.generate()
assert calls and torch.equal(found[0], wanted[0])
other = dl.Transformer(9, 9, d_model=16, nhead=2, connection="denseformer").eval()
other.generate(torch.tensor([[3, 4]]), 3)
try:
    dl.compile_decoder(case.model)
except ValueError as error:
    print(error)
"""


def test_strict_mode_lets_hooks_be_called_and_the_engine_be_demanded() -> None:
    """No kernel is passed by where PyTorch calls a hook; compile_decoder is what refuses such a model."""
    done = run(STRICT, DEPTHLSTM_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model must be one that the decode engine runs: ")
    assert done.stdout.endswith("has hooks\n")
    assert done.stderr.count("generate() runs in PyTorch, not in the decode engine: ") == 2
