"""The pool of large CPU outputs, and glibc's kept memory: whatever lives, dies, forks or runs out."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import F32, Types, arguments, needs_cpp
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast import memory

pytestmark = needs_cpp
MIB = 1 << 20
LIKE = torch.empty(1)


@pytest.fixture(autouse=True)
def own_pool() -> Iterator[None]:
    """An empty pool, of the usual limit."""
    before = dl.memory_stats()
    dl.empty_cache()
    yield
    memory.set_pool_limit(before.limit_bytes)
    dl.empty_cache()


def block(mib: int = 4) -> Tensor:
    return memory.empty_matrix(LIKE, mib, MIB // 4)


def gates(rows: int = 1024, features: int = 1024) -> tuple[Tensor, Tensor]:
    """Outputs of 4 MiB each at the usual size."""
    tensors, options = arguments(rows, features, Types(F32, F32, F32))
    return dl.depth_lstm_gates(**tensors, **options, backend="cpp")


def in_a_process(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_outputs_lie_in_blocks_that_come_back() -> None:
    before = dl.memory_stats()
    h, c = gates()
    found = dl.memory_stats()
    assert found.live_bytes - before.live_bytes == h.nbytes + c.nbytes == 8 * MIB
    places = {h.data_ptr(), c.data_ptr()}
    # near the beginning of a huge page, and in different sets of the caches
    assert all(place % (2 * MIB) < 65536 and place % 256 == 0 for place in places)
    assert len({place % 4096 for place in places}) == 2
    del h, c
    found = dl.memory_stats()
    assert (found.idle_bytes, found.live_bytes) == (8 * MIB, before.live_bytes)
    h, c = gates()
    assert {h.data_ptr(), c.data_ptr()} == places
    assert dl.memory_stats().reused == found.reused + 2


def test_small_outputs_are_not_pooled() -> None:
    before = dl.memory_stats()
    outputs = gates(1023)
    assert dl.memory_stats() == before
    del outputs


def test_gradients_and_products_of_a_cell_are_pooled() -> None:
    """z (16 MiB), h and c (4 each); then dz, [dx | dh] (8) and dc, dW (16 x 2) beside what autograd keeps."""
    x, h, c = (torch.randn(1024, 1024, requires_grad=True) for _ in range(3))
    w = torch.randn(4096, 2048, requires_grad=True)
    before = dl.memory_stats()
    outputs = dl.depth_lstm_cell(x, h, c, w, backend="cpp")
    assert dl.memory_stats().live_bytes - before.live_bytes == 24 * MIB
    found = torch.autograd.grad(outputs, (x, h, c, w), [torch.randn_like(output) for output in outputs])
    assert dl.memory_stats().live_bytes - before.live_bytes >= (8 + 8 + 4 + 32) * MIB
    del outputs, found
    assert dl.memory_stats().live_bytes == before.live_bytes


def test_recycled_blocks_are_poisoned_in_tests_and_written_by_kernels() -> None:
    """What a kernel leaves unwritten would be an old result, which no other test could tell from a new one."""
    first = block()
    place = first.data_ptr()
    first.fill_(1.0)
    del first
    again = block()
    assert again.data_ptr() == place
    assert again.isnan().all()
    del again
    torch.manual_seed(0)
    fresh = [output.clone() for output in gates()]
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(gates(), fresh, strict=True))


def test_idle_blocks_hold_at_most_the_limit() -> None:
    memory.set_pool_limit(12 * MIB)
    blocks = [block() for _ in range(5)]
    places = [tensor.data_ptr() for tensor in blocks]
    while blocks:
        del blocks[0]
        assert dl.memory_stats().idle_bytes <= 12 * MIB
    assert dl.memory_stats().idle_blocks == 3
    kept = [block() for _ in range(3)]
    assert {tensor.data_ptr() for tensor in kept} == set(places[2:])  # the oldest went
    del kept
    too_large = block(16)
    del too_large
    assert dl.memory_stats().idle_blocks == 3
    memory.set_pool_limit(4 * MIB)
    assert dl.memory_stats().idle_blocks == 1
    memory.set_pool_limit(0)
    assert dl.memory_stats().idle_bytes == 0
    live = dl.memory_stats().live_blocks
    tensor = block()
    assert dl.memory_stats().live_blocks == live
    assert tensor.untyped_storage().resizable()  # torch's own


def test_a_block_serves_what_nearly_fills_it() -> None:
    large = block(16)
    place = large.data_ptr()
    del large
    assert block(10).data_ptr() != place  # a third of it would be wasted
    assert block(12).data_ptr() == place


def test_empty_cache_leaves_what_lives() -> None:
    kept, gone = block(), block()
    kept.fill_(3.0)
    del gone
    before = dl.memory_stats()
    dl.empty_cache()
    found = dl.memory_stats()
    assert (found.idle_blocks, found.live_blocks) == (0, before.live_blocks)
    assert found.returned == before.returned + 1
    assert (kept == 3).all()


def test_storages_outlive_their_tensors() -> None:
    before = dl.memory_stats().live_blocks
    tensor = block()
    views = [tensor[1], tensor.untyped_storage(), tensor.numpy(), tensor.detach(), torch.from_dlpack(tensor)]
    tensor.fill_(2.0)
    del tensor
    while views:
        assert dl.memory_stats().live_blocks == before + 1
        del views[0]
    assert dl.memory_stats().live_blocks == before


def test_copies_are_torchs_own() -> None:
    tensor = block()
    tensor.fill_(5.0)
    before = dl.memory_stats().live_blocks
    copies = [tensor.clone(), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))]
    assert all((one == 5).all() for one in copies)
    assert dl.memory_stats().live_blocks == before


def test_shared_memory_takes_the_place_of_a_block() -> None:
    tensor = block()
    tensor.fill_(5.0)
    before = dl.memory_stats().live_blocks
    tensor.share_memory_()
    assert tensor.is_shared()
    assert (tensor == 5).all()
    assert dl.memory_stats().live_blocks == before - 1


def test_resize() -> None:
    """Smaller works; larger is refused by torch, as for every storage that is not its allocator's own."""
    tensor = block()
    tensor.fill_(5.0)
    assert (tensor.resize_(3, 5) == 5).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(8 * MIB)


def test_deterministic_algorithms() -> None:
    torch.manual_seed(0)
    wanted = [output.clone() for output in gates()]
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(gates(), wanted, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads() -> None:
    """Each thread's blocks are its own, also where another thread drops them."""
    wrong: list[str] = []
    dropped: list[Tensor] = []

    def work(number: int) -> None:
        for step in range(40):
            tensor = block(4 + 2 * (step % 3))
            tensor.fill_(number)
            if not (tensor == number).all():
                wrong.append(f"thread {number}, step {step}")
            dropped.append(tensor)
            if len(dropped) > 6:
                dropped.pop(0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    dropped.clear()
    assert dl.memory_stats().idle_bytes <= dl.memory_stats().limit_bytes


def test_ten_thousand_tensors_alive() -> None:
    found = in_a_process("""
        import torch, depthlstm_fast as dl
        from depthlstm_fast import memory
        like = torch.empty(1)
        tensors = [memory.empty_matrix(like, 4, 1 << 18) for _ in range(10_000)]
        assert dl.memory_stats().live_blocks == 10_000
        assert len({tensor.data_ptr() for tensor in tensors}) == 10_000
        for number in (0, 5_000, 9_999):
            tensors[number].fill_(number)
        assert [tensors[number][3, -1].item() for number in (0, 5_000, 9_999)] == [0, 5_000, 9_999]
        del tensors
        assert dl.memory_stats().live_blocks == 0
        assert dl.memory_stats().idle_bytes <= dl.memory_stats().limit_bytes
    """)
    assert found.returncode == 0, found.stderr


def test_fork_and_exit() -> None:
    """A child has blocks of its own, also where another thread is in the pool meanwhile; exit frees what lives."""
    found = in_a_process("""
        import os, threading, torch, depthlstm_fast as dl
        from depthlstm_fast import memory
        torch.set_num_threads(1)
        like = torch.empty(1)
        kept = memory.empty_matrix(like, 4, 1 << 18).fill_(1)
        going = True
        def churn():
            while going:
                memory.empty_matrix(like, 4, 1 << 18)
        thread = threading.Thread(target=churn)
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                own = memory.empty_matrix(like, 4, 1 << 18).fill_(2)
                kept.fill_(3)
                os._exit(0 if bool((own == 2).all()) else 1)
            assert os.waitpid(child, 0)[1] == 0
        going = False
        thread.join()
        assert bool((kept == 1).all())
        outlives = [kept, memory.empty_matrix(like, 8, 1 << 18)]
        torch.keep = outlives
        print("end")
    """)
    assert (found.returncode, found.stdout) == (0, "end\n"), found.stderr


def test_where_memory_runs_out_the_pool_empties_itself_first() -> None:
    found = in_a_process("""
        import resource, torch, depthlstm_fast as dl
        from depthlstm_fast import memory
        torch.set_num_threads(1)
        like = torch.empty(1)
        idle = [memory.empty_matrix(like, 64, 1 << 18) for _ in range(4)]
        del idle
        assert dl.memory_stats().idle_bytes == 256 << 20
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), resource.RLIM_INFINITY))
        tensor = memory.empty_matrix(like, 160, 1 << 18)
        assert dl.memory_stats().idle_bytes == 0
        try:
            memory.empty_matrix(like, 1024, 1 << 18)
        except RuntimeError as error:
            print("cannot allocate memory" in str(error))
    """)
    assert (found.returncode, found.stdout) == (0, "True\n"), found.stderr


@pytest.mark.parametrize("value", ["4 GiB", "-1", "1e9", "9" * 20])
def test_a_limit_that_is_no_number(value: str) -> None:
    found = in_a_process(
        """
        import torch, depthlstm_fast as dl
        for call in (dl.memory_stats, lambda: dl.depth_lstm_cell(*[torch.ones(2048, 512)] * 3, torch.ones(2048, 1024))):
            try:
                call()
            except ValueError as error:
                print(error)
        """,
        DEPTHLSTM_POOL_BYTES=value,
    )
    line = f"DEPTHLSTM_POOL_BYTES must be a number of bytes; found {value!r}\n"
    assert (found.returncode, found.stdout) == (0, 2 * line), found.stderr


def test_the_limit_of_the_environment() -> None:
    text = "import depthlstm_fast as dl; print(dl.memory_stats().limit_bytes)"
    for value in ("0", "12345678"):
        assert in_a_process(text, DEPTHLSTM_POOL_BYTES=value).stdout == f"{value}\n"
    ours = int(in_a_process(text, DEPTHLSTM_POOL_BYTES="").stdout)
    assert 0 < ours <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def test_steps_of_changing_shapes_keep_resident_memory_flat() -> None:
    found = in_a_process(
        """
        import random, torch, depthlstm_fast as dl
        torch.set_num_threads(1)
        random.seed(0)
        cell = dl.DepthLSTMCell(128, 128)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        sizes = []
        for step in range(60):
            x = torch.randn(random.randrange(4000, 16000), 128)
            h, c = cell(x)
            (h.square().mean() + c.square().mean()).backward()
            del h, c, x
            assert dl.memory_stats().idle_bytes <= 64 << 20
            sizes.append(resident())
        print(max(sizes[30:]) - max(sizes[:30]), dl.memory_stats().live_blocks)
        """,
        DEPTHLSTM_POOL_BYTES=str(64 * MIB),
        DEPTHLSTM_STRICT="1",
        # torch's own blocks go back to the system at once: holes in glibc's heap came to more than the bound
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    assert found.returncode == 0, found.stderr
    growth, live = map(int, found.stdout.split())
    assert (growth <= 16, live) == (True, 0), found.stdout


def test_keep_memory_is_undone() -> None:
    found = in_a_process("""
        import warnings
        warnings.simplefilter("error")
        import torch, depthlstm_fast as dl
        def place_twice():
            first = torch.empty(80 << 18).fill_(1)
            place = first.data_ptr()
            del first
            return open("/proc/self/statm").read().split()[1]
        dl.keep_memory()
        kept = int(place_twice())
        dl.keep_memory(False)
        freed = int(place_twice())
        print((kept - freed) * 4096 >> 20)
    """)
    assert found.returncode == 0, found.stderr
    assert 70 <= int(found.stdout) <= 90


def test_keep_memory_elsewhere_says_why_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(RuntimeWarning, match=r"keep_memory\(True\) changes nothing: .* darwin"):
        dl.keep_memory()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with pytest.warns(RuntimeWarning, match="the C library is not glibc"):
        dl.keep_memory()


def test_bad_limits() -> None:
    with pytest.raises(TypeError, match="limit_bytes must be an int; found str"):
        memory.set_pool_limit("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit_bytes must be at least 0; found -1"):
        memory.set_pool_limit(-1)
