"""Models and batches, shared by the tests of linearised layers."""

from __future__ import annotations

from typing import Any

import torch
from connection_helpers import FORMS, SMALL, model, randomise
from torch import Tensor

import depthlstm_fast as dl

KEEPING = [form for form in FORMS if not model(form).encoder.connection.mixes_depth]


def many(number: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Ragged batches of 24 sentences, by default of more than the 160 tokens that are wanted on either side."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        src, tgt = (torch.randint(3, 11, (24, length), generator=generator) for length in (6, 5))
        tgt[:, 0] = 1
        src[::3, 4:] = tgt[::3, 3:] = src[1::3, 2:] = 0
        made.append((src, tgt))
    return made


def translator(module: Any = dl, **options: Any) -> Any:
    return randomise(module.DepthLSTMTransformer(**{**SMALL, "dropout": 0.1, **options})).eval()
