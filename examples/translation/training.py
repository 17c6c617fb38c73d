"""The model's size, its optimizer and one training step: teacher forcing, label smoothing, clipped gradients, Adam after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from batches import Batch
from tokenizer import BOS, EOS, PAD
from torch import nn

import depthlstm_fast as dl


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the defaults fit two CPU cores."""

    steps: int = 50
    token_budget: int = 1024
    vocab_size: int = 2000
    d_model: int = 256
    heads: int = 4
    layers: int = 4
    dropout: float = 0.0
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def model_arguments(self, vocab_size: int) -> dict[str, Any]:
        """Return the keyword arguments of ``DepthLSTMTransformer`` for a joint vocabulary of ``vocab_size`` pieces."""
        return {
            "src_vocab": vocab_size,
            "tgt_vocab": vocab_size,
            "d_model": self.d_model,
            "nhead": self.heads,
            "num_encoder_layers": self.layers,
            "num_decoder_layers": self.layers,
            "dropout": self.dropout,
            "share_embeddings": True,
            "pad_id": PAD,
            "bos_id": BOS,
            "eos_id": EOS,
        }


class StepResult(NamedTuple):
    """Mean loss of a step, in nats a target token, and its speed in source and target tokens a second."""

    loss: float
    tokens_per_second: float


class Trainer:
    """A model with its optimizer and schedule.

    Args:
        model: a ``DepthLSTMTransformer``, the fused or the reference one.
        settings: see ``Settings``.
        backend: what the fused model runs on; None leaves it alone, as for a reference model.
    """

    def __init__(self, model: nn.Module, settings: Settings, backend: str | None = None) -> None:
        self.model = model.to(settings.device)
        self.settings = settings
        self.backend = backend
        self.optimizer = torch.optim.AdamW(
            dl.param_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
        )
        warmup = max(1, settings.warmup_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
        )

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the mean cross entropy of the target tokens, each predicted from those before it; padding does not count."""
        source, target = batch.source.to(self.settings.device), batch.target.to(self.settings.device)
        with dl.use_backend(self.backend) if self.backend else nullcontext():
            logits = self.model(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=label_smoothing)

    def step(self, batch: Batch) -> StepResult:
        """Train on ``batch`` once."""
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch, self.settings.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        value = loss.item()  # after the update: reading it waits until the device has done the whole step
        seconds = time.perf_counter() - start
        self.schedule.step()
        return StepResult(value, batch.tokens / seconds)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss a target token over ``batches``, without dropout or label smoothing."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in batches:
            tokens = int((batch.target[:, 1:] != PAD).sum())
            total += self.loss(batch).item() * tokens
            count += tokens
        return total / count
