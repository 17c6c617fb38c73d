"""Sources padded on either side.

Positions are absolute: padding on the left moves a sentence, padding on the right does not.
"""

from __future__ import annotations

import pytest
import torch
from client_helpers import SOURCE, D, batch, model
from torch import Tensor

PAD = 2  # tokens of padding


def padded(source: Tensor, side: str, fill: int = 0) -> Tensor:
    filling = torch.full((source.shape[0], PAD), fill)
    return torch.cat((filling, source) if side == "left" else (source, filling), 1)


@pytest.fixture
def source() -> Tensor:
    return torch.randint(3, SOURCE, (3, 6))


def test_padding_on_the_right_changes_nothing(source: Tensor) -> None:
    made, target = model(), batch(3)[1]
    memory = made.encode(padded(source, "right"))
    torch.testing.assert_close(memory[:, :-PAD], made.encode(source))
    torch.testing.assert_close(made(padded(source, "right"), target), made(source, target))


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_padding_on_the_left_moves_the_sentence(positions: str, source: Tensor) -> None:
    """Check that the result is exactly that of the sentence begun at a later position, which is a different one."""
    made = model(positions=positions)
    memory = made.encode(padded(source, "left"))[:, PAD:]
    moved = made.src_embedding(source) * D**0.5 + (made.src_positions(torch.zeros(1, PAD + 6, D)))[:, PAD:]
    torch.testing.assert_close(memory, made.encoder(moved))
    assert (memory - made.encode(source)).abs().max() > 1e-3


def test_sources_padded_on_the_left_are_put_right(source: Tensor) -> None:
    made, target = model().eval(), batch(3)[1]
    left = padded(source, "left")
    left[0, PAD] = 0  # one row has more padding than the others
    order = (left == made.pad_id).to(torch.int8).argsort(dim=1, stable=True)
    right = left.gather(1, order)
    for row, tokens in enumerate((source[:1, 1:], source[1:2], source[2:])):
        torch.testing.assert_close(made(right, target)[row : row + 1], made(tokens, target[row : row + 1]))
        together, alone = made.generate(right, max_length=5)[row], made.generate(tokens, max_length=5)[0]
        assert torch.equal(together[: len(alone)], alone)
        assert (together[len(alone) :] == made.pad_id).all()  # other sources may take longer


def test_mask_stands_in_for_the_padding_token(source: Tensor) -> None:
    """Check masking as by a tokenizer's attention_mask == 0.

    Masked tokens are not seen, for any id. An unmasked pad_id is a token.
    """
    made, target = model().eval(), batch(3)[1]
    filled = padded(source, "right", fill=5)
    mask = torch.zeros_like(filled, dtype=torch.bool)
    mask[:, -PAD:] = True
    torch.testing.assert_close(made(filled, target, src_key_padding_mask=mask), made(source, target))
    tokens = made.generate(filled, max_length=5, src_key_padding_mask=mask)
    torch.testing.assert_close(tokens, made.generate(source, max_length=5))
    unmasked = made(padded(source, "right"), target, src_key_padding_mask=torch.zeros_like(mask))
    assert (unmasked - made(source, target)).abs().max() > 1e-3
