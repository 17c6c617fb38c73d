"""Searches return to Python often: sources and prompts are read in groups, and calls are short."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_cpp
from test_operators import blob, model, start

import depthlstm_fast as dl
from depthlstm_fast.decode.engine import next_steps, operators

pytestmark = needs_cpp


@pytest.mark.parametrize("threads", [1, 2])
def test_sources_are_read_in_groups(threads: int) -> None:
    """Of 256 positions at most, so that a program is never away for long."""
    each, ops = model(), operators()
    packed, src = blob(each), torch.randint(3, 30, (70, 15))
    mask = torch.zeros(70, 15)
    mask[::2, 11:] = -torch.inf
    state, left = start(packed, src, mask, beams=1, threads=threads), []
    with pytest.raises(RuntimeError, match=r"state must have read all sources: .* found \d+ that wait"):
        ops.decode_advance(packed, state, 1)
    with pytest.raises(RuntimeError, match="source and mask must be those of decode_start"):
        ops.decode_read(packed, state, src, None)
    with pytest.raises(RuntimeError, match="source and mask must be those of decode_start"):
        ops.decode_read(packed, state, src[1:], mask[1:])
    with pytest.raises(RuntimeError, match="source and mask must be those of decode_start"):
        ops.decode_read(packed, state, src.flip(0), mask)
    while not left or left[-1]:
        left.append(ops.decode_read(packed, state.contiguous(), src, mask))
        state = state.clone()  # it has no address in it
    sizes = [15 if row % 2 else 11 for row in range(70)]
    assert len(left) > sum(sizes) // (256 * threads) - 1
    assert left == sorted(left, reverse=True)
    ops.decode_advance(packed, state, 5)
    tokens, scores = ops.decode_finish(packed, state)
    wanted = each.generate(src, 5, return_scores=True, src_key_padding_mask=mask)
    assert torch.equal(tokens, wanted[0])
    torch.testing.assert_close(scores, wanted[1])


def test_calls_take_as_many_steps_as_a_moment_has() -> None:
    assert [next_steps(steps, 0.05) for steps in (1, 30)] == [1, 30]
    assert [next_steps(8, seconds) for seconds in (0.1, 10.0, 0.025, 1e-9, 0.0)] == [4, 1, 16, 32, 32]
    assert next_steps(4000, 0.001) == 4096


def test_prompts_are_read_in_groups() -> None:
    """Of 256 positions, in the middle of a prompt, too; the last token of each is the first step's."""
    each = dl.LanguageModel(50, d_model=24, nhead=3, num_layers=2, max_len=600, eos_id=None).eval()
    ids, ops, packed = torch.randint(3, 50, (3, 301)), operators(), blob(each)
    state = start(packed, ids, beams=1)
    assert [ops.decode_read(packed, state, ids, None) for _ in range(4)] == [2, 1, 0, 0]
    ops.decode_advance(packed, state, 5)
    tokens, scores = ops.decode_finish(packed, state)
    wanted = each.generate(ids, 5, return_scores=True)
    assert torch.equal(tokens, wanted[0][:, -5:])
    torch.testing.assert_close(scores, wanted[1])


def test_steps_by_hand_leave_no_hypotheses() -> None:
    packed, ops, src = blob(), operators(), torch.randint(3, 30, (2, 5))
    state = start(packed, src, beams=1)
    ops.decode_step(packed, state, None)
    ops.decode_advance(packed, state, 5)
    with pytest.raises(RuntimeError, match="state must be that of a search that has ended"):
        ops.decode_finish(packed, state)


def test_any_number_of_threads_is_taken() -> None:
    packed, ops, src = blob(), operators(), torch.randint(3, 30, (3, 5))
    for threads in (200, 10**6, 2**63 - 1):
        state = start(packed, src, threads=threads)
        assert ops.decode_read(packed, state, src, None) == 0
        while ops.decode_advance(packed, state, 5).tolist()[0]:
            pass
        assert ops.decode_finish(packed, state)[0].shape[0] == 3
