"""All runs of a study: gradients at initialisation, dev cross entropy by depth, speed and memory.

All models of one depth have equally many matrix weights and see the same batches. Each has its own learning rate. It is
the rate of a grid with the lowest dev cross entropy for the first seed. A grid of several rates is extended while its
best rate is at its end. The other seeds then run with that rate. Each run is one thread of one process, with as many at
once as there are cores. The speed is measured last, with nothing beside it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from batches import BatchOrder, collate, group, share, target_tokens
from corpus.files import DamagedError, check_values, read_json, to_json
from corpus.prepared import Corpus, load_corpus
from torch import Tensor, nn
from training import DivergedError, Settings, Trainer, build_model

import depthlstm_fast as dl
from depthlstm_fast.bench.measure import machine
from depthlstm_fast.bench.measure.kept import kept_bytes
from depthlstm_fast.bench.measure.timing import interleave, spread

RATES = (2e-3, 4e-3, 8e-3)
FURTHER = 1  # the most steps, of a factor of 2, that extend a grid
SEEDS = (0, 1, 2)
DEV_PAIRS = 250
EVERY = 20  # steps that one point of a learning curve averages
FORGET_BIASES = tuple(f"depth-lstm, forget bias {bias}" for bias in range(4))
RIVAL = "pre-norm"
VARIANTS: dict[str, dict[str, Any]] = {
    name: {"architecture": "depth-lstm", "forget_bias": float(bias)} for bias, name in enumerate(FORGET_BIASES)
} | {name: {"architecture": name} for name in dl.connections.names() if name != "depth-lstm"}
VARIANTS["deepnorm"]["init"] = "deepnorm"  # the weights' scale is a part of it
# Every connection learns at one depth; the forget biases and the rival at a shallow and a deep one, too.
PLAN: dict[int, tuple[str, ...]] = {
    6: (*FORGET_BIASES, RIVAL),
    12: tuple(VARIANTS),
    24: (*FORGET_BIASES, RIVAL),
}
GRADIENT_DEPTHS = (12, 24, 48)
COST_DEPTH = 12
INITS = ("lipschitz", "glorot")
BASE = Settings(
    steps=500,
    token_budget=1024,
    d_model=64,
    heads=4,
    layers=6,
    dropout=0.0,
    warmup_steps=50,
    weight_decay=0.0,
    label_smoothing=0.0,
)


@dataclass(frozen=True)
class Task:
    """One variant at one depth: all its runs, one after the other."""

    corpus: Path
    runs: Path
    variant: str
    layers: int
    base: Settings
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    dev_pairs: int


def write_atomically(path: Path, found: dict[str, Any]) -> None:
    """Write ``found`` as JSON to ``path``, all of it or nothing."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(to_json(found, indent=1), encoding="utf-8")
    os.replace(partial, path)


def dev_batches(corpus: Corpus, pairs: int, token_budget: int) -> list[Any]:
    """Return the same ``pairs`` of the dev set for every run, in batches."""
    count = len(corpus.examples["dev"])
    chosen = [corpus.examples["dev"][index * count // pairs] for index in range(min(pairs, count))]
    ordered = sorted(chosen, key=lambda example: (len(example[0]), len(example[1])))
    return [collate(rows) for rows in group(ordered, token_budget)]


def unigram_loss(corpus: Corpus, batches: Iterable[Any], steps: int, base: Settings) -> float:
    """Return the dev cross entropy, in nats a token, of the frequencies of a run's target tokens.

    Each token is counted once more than it occurs.
    """
    counts = torch.ones(len(corpus.tokenizer), dtype=torch.float64)
    order = BatchOrder(corpus.examples["train"], base.token_budget, base.seed)
    for index in range(steps):
        for _, target in order[index]:
            counts += torch.bincount(torch.tensor(target[1:]), minlength=len(counts))
    log = (counts / counts.sum()).log()
    tokens = torch.cat([batch.target[:, 1:][batch.target[:, 1:] != 0] for batch in batches])
    return -float(log[tokens].mean())


def train_run(corpus: Corpus, settings: Settings, dev: Sequence[Any]) -> dict[str, Any]:
    """Train from scratch; losses are cross entropies in nats a target token, None from the divergence on."""
    trainer = Trainer(build_model(settings, len(corpus.tokenizer)), settings, "auto")
    # the seed is the model's; every run sees the same batches
    order, losses = BatchOrder(corpus.examples["train"], settings.token_budget, 0), []
    for _ in range(settings.steps):
        try:
            losses.append(trainer.step_in(order).loss)
        except DivergedError:
            losses.append(math.nan)
            break
    dev_loss = trainer.evaluate(dev) if math.isfinite(losses[-1]) else math.nan
    means = [
        sum(losses[start : start + EVERY]) / len(losses[start : start + EVERY])
        for start in range(0, len(losses), EVERY)
    ]
    return {
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "dev_loss": dev_loss if math.isfinite(dev_loss) else None,
        "train_losses": [value if math.isfinite(value) else None for value in means],
        "backend": dl.last_backend(),
    }


def read_run(path: Path) -> dict[str, Any]:
    """Return the result of ``train_run`` kept in ``path``.

    Raises:
        DamagedError: the file holds something else.
    """
    run = read_json(path, {"variant": str, "layers": int, "learning_rate": float, "seed": int, "train_losses": list})
    check_values(
        path, {"dev_loss": 0.0} | {name: value for name, value in run.items() if value is not None}, {"dev_loss": float}
    )
    return run


def run_task(task: Task) -> list[dict[str, Any]]:
    """Do all runs of one variant at one depth: tune the learning rate, then run the other seeds.

    Runs that are on disk already are read.
    """
    torch.set_num_threads(1)
    corpus = load_corpus(task.corpus)
    dev = dev_batches(corpus, task.dev_pairs, task.base.token_budget)
    settings = replace(task.base, layers=task.layers, **VARIANTS[task.variant])
    found: list[dict[str, Any]] = []

    def run(rate: float, seed: int) -> float:
        path = task.runs / f"{task.variant.replace(', ', '-').replace(' ', '-')}-{task.layers}-{rate:g}-{seed}.json"
        if not path.exists():
            result = train_run(corpus, replace(settings, learning_rate=rate, seed=seed), dev)
            write_atomically(path, {"variant": task.variant, "layers": task.layers} | result)
        found.append(read_run(path))
        loss = found[-1]["dev_loss"]
        return math.inf if loss is None else loss

    losses = {rate: run(rate, task.seeds[0]) for rate in task.rates}
    for _ in range(FURTHER if len(task.rates) > 1 else 0):
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            break
        losses[best * (2 if best == max(losses) else 0.5)] = run(
            best * (2 if best == max(losses) else 0.5), task.seeds[0]
        )
    best = min(losses, key=losses.__getitem__)
    for seed in task.seeds[1:]:
        run(best, seed)
    return found


def layer_gradients(model: nn.Module, batch: Any, name: str) -> list[float]:
    """Return the norm of the loss's gradient at the output of each layer of a stack, from first to last.

    The output of a depth-wise LSTM's layer is h; that of another connection's is its whole state.
    """
    if isinstance(model, dl.Transformer):
        return list(dl.probe_gradients(model.train(), (batch.source, batch.target))[name].gradients)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.retain_grad()
        outputs.append(hidden)

    hooks = [layer.register_forward_hook(keep) for layer in getattr(model, name).layers]
    logits = model.train()(batch.source, batch.target[:, :-1])
    for hook in hooks:
        hook.remove()
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=0).backward()
    return [0.0 if hidden.grad is None else float(hidden.grad.norm()) for hidden in outputs]


def gradients(corpus: Corpus, base: Settings, depths: Sequence[int]) -> list[dict[str, Any]]:
    """Return the gradient at each layer before any training, for every variant, initialisation and depth.

    The models are plain PyTorch.
    """
    batch = collate(BatchOrder(corpus.examples["train"], base.token_budget // 4, 0)[0])
    found = []
    for variant, options in VARIANTS.items():
        for init in INITS:
            for layers in depths:
                settings = replace(base, **{"layers": layers, "init": init} | options)
                for name in ("encoder", "decoder"):
                    model = build_model(settings, len(corpus.tokenizer), "reference")
                    norms = layer_gradients(model, batch, name)
                    found.append({"variant": variant, "init": init, "layers": layers, "stack": name, "norms": norms})
    return found


def costs(corpus: Corpus, base: Settings, layers: int, seconds: float) -> list[dict[str, Any]]:
    """Measure the speed of a training step and the bytes kept for backward, of all variants in turn."""
    examples = BatchOrder(corpus.examples["train"], base.token_budget, 0)[0]
    batch, predicted = share(examples), target_tokens(examples)
    trainers: dict[str, Trainer] = {}
    # forget biases differ in nothing that takes time
    for name in (name for name in VARIANTS if name not in FORGET_BIASES[1:]):
        settings = replace(base, layers=layers, **VARIANTS[name])
        trainers[name] = Trainer(build_model(settings, len(corpus.tokenizer)), settings, "auto")
    samples = interleave(
        {name: lambda t=trainer: t.step(batch, predicted=predicted) for name, trainer in trainers.items()},  # type: ignore[misc]
        seconds=seconds,
    )
    found = []
    for name, trainer in trainers.items():
        speed = spread([batch.tokens / time for time in samples[name]])
        parameters = list(trainer.model.parameters())
        kept = kept_bytes(lambda t=trainer: t.loss_sum(batch), parameters)  # type: ignore[misc]
        found.append(
            {
                "variant": name,
                "layers": layers,
                "parameters": sum(parameter.numel() for parameter in parameters),
                "tokens_per_second": asdict(speed),
                "kept_mb": kept / 1e6,
                "repetitions": len(samples[name]),
            }
        )
    return found


def once(path: Path, make: Any) -> Any:
    """Return the result of ``make()``, which is kept in ``path`` the first time and read from it later."""
    if not path.exists():
        write_atomically(path, {"found": make()})
    found = read_json(path)
    if "found" not in found:
        raise DamagedError(f"{path} must hold what this study found; found other values")
    return found["found"]


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes started inside the block ignore the terminal's interrupt.

    This process passes the interrupt on to them in its own way.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def study(
    folder: Path,
    output: Path,
    base: Settings = BASE,
    plan: Mapping[int, Sequence[str]] = PLAN,
    gradient_depths: Sequence[int] = GRADIENT_DEPTHS,
    cost_depth: int = COST_DEPTH,
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = SEEDS,
    dev_pairs: int = DEV_PAIRS,
    workers: int | None = None,
    seconds: float = 8.0,
) -> dict[str, Any]:
    """Do everything that ``output`` does not hold yet, and write ``output``/study.json.

    Raises:
        ValueError: ``output`` holds another study, or ``folder`` is not a prepared folder.
    """
    corpus = load_corpus(folder)
    dev = dev_batches(corpus, dev_pairs, base.token_budget)
    about = {
        "settings": asdict(base)
        | {
            "rates": list(rates),
            "seeds": list(seeds),
            "plan": {str(layers): list(variants) for layers, variants in plan.items()},
            "gradient_depths": list(gradient_depths),
            "cost_depth": cost_depth,
            "every": EVERY,
            "dev_pairs": dev_pairs,
        },
        "corpus": {name: corpus.meta[name] for name in ("dataset", "pairs", "vocabulary")} | {"digest": corpus.digest},
    }
    runs = output / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    known = once(output / "about.json", lambda: about)
    if known != json.loads(json.dumps(about)):
        raise ValueError(f"output must be a new folder or hold this very study; found another one's runs in {output}")
    found: dict[str, Any] = about | {"variants": list(VARIANTS)}
    found["machine"] = once(output / "machine.json", machine.describe)
    found["unigram_loss"] = unigram_loss(corpus, dev, base.steps, base)
    print("gradients at initialisation", file=sys.stderr, flush=True)
    found["gradients"] = once(output / "gradients.json", lambda: gradients(corpus, base, gradient_depths))
    # the deepest first, so that the shortest fill up the last core
    tasks = [
        Task(folder, runs, variant, layers, base, rates, seeds, dev_pairs)
        for layers in sorted(plan, reverse=True)
        for variant in plan[layers]
    ]
    found["runs"] = []
    workers = workers or machine.usable_cores()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        with deaf_children():
            waiting = {pool.submit(run_task, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                found["runs"] += future.result()
                task = waiting[future]
                print(f"{task.variant}, {task.layers} layers: {len(future.result())} runs", file=sys.stderr, flush=True)
        except BaseException:  # ends at once, because the other tasks' results so far are kept
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    found["runs"].sort(
        key=lambda run: (list(VARIANTS).index(run["variant"]), run["layers"], run["learning_rate"], run["seed"])
    )
    print("speed and memory", file=sys.stderr, flush=True)
    found["costs"] = once(output / "costs.json", lambda: costs(corpus, base, cost_depth, seconds))
    write_atomically(output / "study.json", found)
    return found
