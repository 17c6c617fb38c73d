"""The settings of a run, one training step, and evaluation.

Training uses teacher forcing, label smoothing, clipped gradients, and AdamW after a warm-up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from batches import Batch, BatchOrder, share, target_tokens
from corpus.tokenizer import PAD
from parallel import Processes, divide, like, own_part, reshard, synchronise_gradients, whole
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.translate.architectures import build_architecture, model_arguments
from depthlstm_fast.translate.run import check_tensors, load_parameters

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the defaults suit a corpus of some hundred short pairs and two CPU cores.

    ``token_budget`` counts ids of source and target of one batch, padding included. A step takes ``accumulate``
    batches. ``learning_rate`` is the highest, reached after ``warmup_steps``. ``dtype`` is "fp32", or "bf16" for
    autocast.

    Raises:
        ValueError: a number or name is invalid.
    """

    steps: int = 800
    token_budget: int = 2048
    accumulate: int = 1
    architecture: str = "depth-lstm"
    d_model: int = 128
    heads: int = 4
    layers: int = 2
    dropout: float = 0.3
    init: str = "lipschitz"
    forget_bias: float = 3.0
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    dtype: str = "fp32"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "token_budget", "accumulate", "d_model", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63:  # what torch's generators take
            raise ValueError(f"seed must fit 64 bits; found {self.seed}")
        for name, allowed in (
            ("learning_rate", "above 0"),
            ("clip_norm", "above 0"),
            ("warmup_steps", "0 or more"),
            ("weight_decay", "0 or more"),
        ):
            number = getattr(self, name)
            if not math.isfinite(number) or number < 0 or (number == 0 and allowed == "above 0"):
                raise ValueError(f"{name} must be {allowed}; found {number}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1; found {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {self.dtype!r}")

    def model_arguments(self, vocab_size: int) -> dict[str, Any]:
        """Return the keyword arguments of ``DepthLSTMTransformer`` for a joint vocabulary of ``vocab_size`` pieces."""
        sizes = model_arguments(vocab_size, self.d_model, self.heads, self.layers)
        return sizes | {"dropout": self.dropout, "init": self.init, "forget_bias": self.forget_bias}


def usable_device(device: str) -> str:
    """Return ``device``.

    Raises:
        ValueError: torch does not know it, or cannot use it here.
    """
    try:
        torch.empty(1, device=device).item()  # the meta device, among others, has no numbers
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device must be one that torch can use here; found {device!r}: {str(error).splitlines()[0]}"
        ) from None
    return device


def build_model(settings: Settings, vocab_size: int, backend: str | None = None) -> nn.Module:
    """Return a new model whose weights depend on ``settings.seed`` only.

    ``backend="reference"`` gives a plain PyTorch model.
    """
    torch.manual_seed(settings.seed)
    return build_architecture(settings.architecture, settings.model_arguments(vocab_size), backend)


def learning_rate(settings: Settings, step: int) -> float:
    """Return the rate of step number ``step``, counted from 0: linear warm-up, then the inverse square root."""
    warmup = max(1, settings.warmup_steps)
    return settings.learning_rate * min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


class DivergedError(ValueError):
    """A number that training depends on is NaN or infinite; the message is one line."""


class StepResult(NamedTuple):
    """Result of a step: mean loss in nats a target token, speed in source and target tokens a second, learning rate.

    ``skipped`` is the reason why the weights were left unchanged, or empty.
    """

    loss: float
    tokens_per_second: float
    learning_rate: float
    skipped: str = ""


def not_finite(loss: float) -> str:
    """Return the name of the non-finite number: ``loss``, or else the gradient."""
    return "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"


class Trainer:
    """A model with its optimizer and schedule.

    ``steps`` is the number of steps taken, ``skipped`` the number of steps skipped last in a row.

    Args:
        model: a ``DepthLSTMTransformer``, fused or reference, or a ``Transformer``; with ``group.kind`` "fsdp2"
            its parameters become shards in place.
        settings: see ``Settings``.
        backend: the backend of the fused calls; None leaves it alone.
        group: the processes that share the work. All of them call each method, with their own part of the batches.
        skip_nonfinite: the most steps in a row with a loss or gradient that is not finite. Such steps leave the weights
            unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        backend: str | None = None,
        group: Processes | None = None,
        skip_nonfinite: int = 0,
    ) -> None:
        self.settings, self.group, self.skip_nonfinite = settings, group or Processes(), skip_nonfinite
        self.backend = backend
        self.model = model.to(settings.device)
        self.called = divide(self.model, self.group, settings.device)
        self.optimizer = torch.optim.AdamW(
            dl.param_groups(self.model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.steps = self.skipped = 0

    def loss_sum(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed cross entropy of the target tokens, each predicted from those before it.

        Padding does not count.
        """
        device = torch.device(self.settings.device)
        source, target, dtype = batch.source.to(device), batch.target.to(device), DTYPES[self.settings.dtype]
        with ExitStack() as contexts:
            if self.backend:
                contexts.enter_context(dl.use_backend(self.backend))
            if dtype:
                contexts.enter_context(torch.autocast(device.type, dtype))
            logits = self.called(source, target[:, :-1])
        labels = target[:, 1:].flatten()
        return F.cross_entropy(
            logits.flatten(0, 1).float(), labels, ignore_index=PAD, label_smoothing=label_smoothing, reduction="sum"
        )

    def step(self, *batches: Batch, predicted: int | None = None) -> StepResult:
        """Train once on ``batches``, which count as one.

        Args:
            predicted: number of target tokens of all processes' batches, for the mean loss; None counts those of
                ``batches``.

        Raises:
            DivergedError: the loss or the gradient is not finite, in any process, and this step may not be skipped. No
                process has changed a weight.
        """
        self.model.train()
        start = time.perf_counter()
        predicted = predicted or sum(int((batch.target[:, 1:] != PAD).sum()) for batch in batches)
        rate = learning_rate(self.settings, self.steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        self.optimizer.zero_grad()
        losses = []
        for number, batch in enumerate(batches):
            synchronise_gradients(self.called, number == len(batches) - 1)
            loss = self.loss_sum(batch, self.settings.label_smoothing) / predicted
            # DDP and FSDP2 divide the sum of all processes' gradients by their number
            (loss * self.group.size).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        # The only point of a step that waits for the device. A shard's norm is that of its own part, so the norms are
        # added up here.
        *values, own = torch.stack([*losses, own_part(norm)]).tolist()
        own_tokens = sum(batch.tokens for batch in batches)
        value, tokens, squares = self.group.total(sum(values), own_tokens, own * own, device=self.settings.device)
        reason = "" if math.isfinite(value) and math.isfinite(squares) else not_finite(value)
        if not reason:
            self.optimizer.step()
            self.skipped = 0
        elif self.skipped < self.skip_nonfinite:
            self.skipped += 1
        else:
            raise DivergedError(f"{reason} in step {self.steps + 1}")
        self.steps += 1
        return StepResult(value, tokens / (time.perf_counter() - start), rate, reason)

    def step_in(self, order: BatchOrder) -> StepResult:
        """Train once on this process's part of the next batches in ``order``."""
        first = self.steps * self.settings.accumulate
        chosen = [order[index] for index in range(first, first + self.settings.accumulate)]
        parts = [share(examples, self.group.rank, self.group.size) for examples in chosen]
        return self.step(*parts, predicted=sum(map(target_tokens, chosen)))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss a target token over all processes' ``batches``, without dropout or label smoothing."""
        self.model.eval()
        loss, count = 0.0, 0
        for batch in batches:
            loss += self.loss_sum(batch).item()
            count += int((batch.target[:, 1:] != PAD).sum())
        reshard(self.called)
        loss, tokens = self.group.total(loss, count, device=self.settings.device)
        return loss / tokens

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of all tensors of "model" and "optimizer", and of all processes' "generators".

        The copies are whole and on the CPU.

        Raises:
            DivergedError: one of their numbers is not finite.
        """
        optimizer = {
            f"{key}/{name}": whole(value)
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        generators = self._generators()
        if "cuda" in generators:
            generators["cuda"] = generators["cuda"].to(self.settings.device)  # NCCL gathers there
        generators = {name: self.group.gather(own).cpu() for name, own in generators.items()}
        model = parameters_of(self.model)
        for name, tensor in [*model.items(), *optimizer.items()]:
            if not tensor.isfinite().all():
                raise DivergedError(f"{name} is not finite after step {self.steps}")
        return {"model": model, "optimizer": optimizer, "generators": generators}

    def _generators(self) -> dict[str, Tensor]:
        """Return the states of this process's generators."""
        generators = {"cpu": torch.get_rng_state()}
        if self.settings.device.startswith("cuda"):
            generators["cuda"] = torch.cuda.get_rng_state(self.settings.device)
        return generators

    def load_state(self, state: dict[str, dict[str, Tensor]], steps: int, skipped: int = 0) -> None:
        """Continue from the result of ``state()`` after ``steps`` steps, with the same number of processes.

        Raises:
            ValueError: the tensors are not those of this model, optimizer and number of processes.
        """
        parameters = dict(self.model.named_parameters())
        check_tensors("optimizer", state["optimizer"], optimizer_shapes(parameters, bool(state["optimizer"])))
        check_tensors(
            "generators",
            state["generators"],
            {name: (self.group.size, *own.shape) for name, own in self._generators().items()},
        )
        load_parameters(self.model, state["model"], like)
        for key, value in state["optimizer"].items():
            kind, name = key.split("/", 1)
            own = self.optimizer.state[parameters[name]]
            own[kind] = value.to(self.settings.device) if kind == "step" else like(parameters[name], value)
        try:
            # a copy, because set_rng_state faults on a tensor at an odd place of a file
            torch.set_rng_state(state["generators"]["cpu"][self.group.rank].clone())
            if "cuda" in state["generators"]:
                torch.cuda.set_rng_state(state["generators"]["cuda"][self.group.rank].clone(), self.settings.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"generators must hold torch's states; found {' '.join(str(error).split())}") from None
        self.steps, self.skipped = steps, skipped


def optimizer_shapes(parameters: dict[str, nn.Parameter], stepped: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of AdamW's tensors by their names in ``Trainer.state()``; none before the first step."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters.items() if stepped else ():
        shapes |= {
            f"step/{name}": (),
            f"exp_avg/{name}": tuple(parameter.shape),
            f"exp_avg_sq/{name}": tuple(parameter.shape),
        }
    return shapes


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return each parameter by its name, whole and on the CPU; a tied one comes once."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}
