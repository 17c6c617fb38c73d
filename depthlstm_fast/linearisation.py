"""How much of a layer is linear: the layer replaced by the linear map that fits its states best."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .linear_maps import StateMap, Unchanged
from .linear_sites import LayerSite, StackSite
from .probes import STACKS
from .reference import DepthLSTMDecoder, TranslationModel
from .reference.generation import log_probabilities
from .stacks import Decoder
from .stacks.base import Stack

SCOPES = ("layer", "cell")
TOKENS_A_FEATURE = 20  # of d_model, and no fewer: a map of more numbers than tokens fits anything
Batch = tuple[Tensor, ...]


class Linearised(NamedTuple):
    """What :func:`linearise` returns.

    model: a copy of the given one, with a part of one layer replaced.
    r2: for each replaced part, by its name, R^2 of each tensor of the state that it leaves: "layer", or with
        ``scope="cell"`` the names of cells or branches. 1 minus the squared error over the squared distance from the
        mean, both summed over features and tokens; NaN where the state is constant.
    tokens: how many tokens the map was fitted on.
    ridge: lam.
    kl: the mean Kullback-Leibler divergence a token at each step of the tuning.
    """

    model: nn.Module
    r2: dict[str, tuple[float, ...]]
    tokens: int
    ridge: float
    kl: tuple[float, ...] = ()


class _Moments:
    """Sums over tokens of X'X, X'Y, Y and Y^2 in fp64, X with a column of ones."""

    def __init__(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
        self.before, self.after = ([tuple(each.shape[2:]) for each in side] for side in (before, after))
        self.tokens = 0
        self.xx = self.xy = self.y = self.yy = torch.zeros((), dtype=torch.float64, device=after[0].device)

    def add(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...], keep: Tensor | None) -> None:
        """Add the tokens that ``keep`` (batch, length) has; all of them for None."""
        x, y = (torch.cat([_rows(each, keep) for each in side], 1) for side in (before, after))
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        self.tokens += x.shape[0]
        self.xx, self.xy = self.xx + x.t() @ x, self.xy + x.t() @ y
        self.y, self.yy = self.y + y.sum(0), self.yy + y.square().sum(0)

    def solve(self, ridge: float) -> Tensor:
        """(X'X + lam I)^-1 X'Y."""
        if not self.xx.isfinite().all() or not self.xy.isfinite().all():
            raise ValueError("batches must give states that are finite; found NaN or infinity")
        damped = self.xx + ridge * torch.eye(self.xx.shape[0], dtype=self.xx.dtype, device=self.xx.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise ValueError(f"ridge must be large enough for the states' normal equations; found {ridge}")
        return torch.cholesky_solve(self.xy, factor)

    def unchanged(self) -> Tensor:
        """The matrix that leaves the state as it is."""
        return torch.eye(*self.xy.shape, dtype=self.xy.dtype, device=self.xy.device)

    def r2(self, weight: Tensor) -> tuple[float, ...]:
        """R^2 of X W for each tensor of the state after."""
        residual = self.yy - 2 * (weight * self.xy).sum(0) + (weight * (self.xx @ weight)).sum(0)
        total = self.yy - self.y.square() / self.tokens
        widths = [math.prod(shape) for shape in self.after]
        pairs = zip(residual.split(widths), total.split(widths), strict=True)
        return tuple(_share(float(wrong.sum()), float(all_.sum())) for wrong, all_ in pairs)


def _rows(states: Tensor, keep: Tensor | None) -> Tensor:
    """The chosen tokens of states (batch, length, ...), a row each, in fp64."""
    tokens = states.flatten(0, 1) if keep is None else states[keep]
    return tokens.reshape(tokens.shape[0], math.prod(states.shape[2:])).double()


def _share(residual: float, total: float) -> float:
    return 1 - max(residual, 0.0) / total if total > 0 else math.nan


def linearise(
    model: nn.Module,
    batches: Iterable[Batch],
    layer: int,
    scope: str = "layer",
    *,
    stack: str | None = None,
    drop: bool = False,
    ridge: float = 1e-3,
    held_out: Iterable[Batch] | None = None,
    tune: int = 0,
    learning_rate: float = 1e-3,
) -> Linearised:
    """Replace one layer of a copy of ``model``, or a part of it, by a linear map of its states, as in arXiv 2007.06257.

        W = (X'X + lam I)^-1 X'Y,  X the states before with a column of ones, Y those after, a token a row

    fitted in fp64 on the states that run through the layer in evaluation mode. The copy decodes with caches, and can
    be trained, saved and linearised again at another layer.

    Args:
        model: a translation model, or anything that holds the stacks of this package: :class:`Encoder` and
            :class:`Decoder` of any connection that keeps as many tensors at every depth, :class:`DepthLSTMEncoder` and
            :class:`DepthLSTMDecoder`. It is not changed.
        batches: the arguments of the model, a tuple each; for a translation model (src, tgt) with tgt from bos_id to
            eos_id. Padding does not count: in a translation model pad_id, and what the decoder would say after eos_id;
            else what the key padding mask of the stack says. They hold at least 20 d_model tokens.
        layer: from 0.
        scope: "layer" maps the state before the layer to the state after it: [h ; c] -> [h' ; c'] for the depth-wise
            LSTM. "cell" keeps the branches of a layer with cells, attentions and with ``sublayer`` or ``feed_forward``
            the feed-forward network, and maps [h ; c ; a] -> [h' ; c'] for each cell, a the input that it has; with
            ``merge="concat"`` that is [s ; m]. In a layer without cells it keeps the attentions, and maps the state
            before the feed-forward network to the state after it, norms among it.
        stack: the name of the stack in the model, such as "encoder", "decoder" or "encoder.first". None is the model
            itself where it is a stack, and else "encoder".
        drop: leave the part out instead: the state passes it unchanged.
        ridge: lam, above 0.
        held_out: batches that R^2 is taken on; None for ``batches``.
        tune: steps of Adam that then lower the Kullback-Leibler divergence from ``model``'s next token to the copy's,
            a batch each and in turn, in evaluation mode, while everything but the map is frozen.
        learning_rate: of the first of these; it falls to zero linearly.

    Raises:
        TypeError: an argument is of another type, or tune is above 0 and the model no translation model.
        ValueError: there is no such stack, layer or scope; the tokens are too few, or the connection keeps earlier
            outputs, so that its state grows: a layer without that output has nothing to pass on.
    """
    name, stacks = _choose(model, stack)
    _check(stacks[name], layer, scope, ridge, drop, tune, learning_rate, model)
    batches = _listed("batches", batches, model)
    copied = copy.deepcopy(model)
    own: Any = copied.get_submodule(name)
    site = (StackSite if isinstance(own, Stack) else LayerSite)(own, layer, scope)
    moments = _gather(copied, own, site, batches)
    tokens = min((each.tokens for each in moments.values()), default=0)
    wanted = TOKENS_A_FEATURE * own.d_model
    if tokens < wanted:
        raise ValueError(f"batches must hold at least {wanted} tokens, 20 for each feature; found {tokens}")
    maps: dict[str, Any] = {}
    weight = next(own.parameters())
    for part, each in moments.items():
        if drop:
            maps[part] = Unchanged(len(each.after))
            continue
        state_map = StateMap(each.before, each.after, device=weight.device, dtype=weight.dtype)
        state_map.set(each.solve(ridge))
        maps[part] = state_map
    tested = moments if held_out is None else _gather(copied, own, site, _listed("held_out", held_out, model))
    if not all(each.tokens for each in tested.values()) or not tested:
        raise ValueError("held_out must hold tokens; found none")
    site.replace(maps)
    kl = _tune(model, copied, maps, batches, tune, learning_rate) if tune else ()
    r2 = {part: each.r2(each.unchanged() if drop else maps[part].matrix()) for part, each in tested.items()}
    return Linearised(copied, r2, tokens, ridge, kl)


def _choose(model: nn.Module, stack: str | None) -> tuple[str, dict[str, Any]]:
    """The stack's name, and all stacks of the model by their names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, STACKS)}
    if not stacks:
        raise ValueError("model must hold an Encoder or a Decoder of this package; found none")
    name = ("" if "" in stacks else "encoder") if stack is None else stack
    if name not in stacks:
        raise ValueError(f"stack must be one of {', '.join(map(repr, stacks))}; found {stack!r}")
    return name, stacks


def _check(
    stack: Any, layer: int, scope: str, ridge: float, drop: bool, tune: int, learning_rate: float, model: nn.Module
) -> None:
    checks.check_size("layer", layer, 0)
    if layer >= stack.num_layers:
        raise ValueError(f"layer must be below the stack's {stack.num_layers} layers; found {layer}")
    checks.check_name("scope", scope, SCOPES)
    checks.check_flags(drop=drop)
    checks.check_finite("ridge", ridge, 0.0)
    if ridge == 0:
        raise ValueError(f"ridge must be above 0; found {ridge}")
    checks.check_size("tune", tune, 0)
    checks.check_finite("learning_rate", learning_rate, 0.0)
    if tune and drop:
        raise ValueError(f"tune must be 0 with drop=True, which leaves nothing to tune; found {tune}")
    if tune and not isinstance(model, TranslationModel):
        raise TypeError(f"model must be a translation model to be tuned; found {type(model).__name__}")


def _listed(argument: str, batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    try:
        iterator = iter(batches)
    except TypeError:
        found = type(batches).__name__
        raise TypeError(f"{argument} must hold tuples of the model's arguments; found {found}") from None
    listed = list(iterator)
    for each in listed:
        if not isinstance(each, tuple):
            raise TypeError(f"{argument} must hold tuples of the model's arguments; found {type(each).__name__}")
        if isinstance(model, TranslationModel) and len(each) != 2:
            raise ValueError(f"{argument} must hold pairs (src, tgt) for a translation model; found {len(each)} parts")
    return listed


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's mode comes back."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@torch.no_grad()
def _gather(model: nn.Module, stack: Any, site: Any, batches: list[Batch]) -> dict[str, _Moments]:
    """The moments of each part over all batches."""
    moments: dict[str, _Moments] = {}
    keep: Tensor | None = None

    def note(part: str, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
        if len(after) > len(before) or any(a.shape != b.shape for a, b in zip(before, after, strict=False)):
            raise ValueError("connection must keep tensors of one shape at every depth to be linearised; found others")
        chosen = keep.t() if site.transposed and keep is not None else keep
        moments.setdefault(part, _Moments(before, after)).add(before, after, chosen)

    def mask(called: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal keep
        keep = _kept(called, arguments, options)

    decodes = isinstance(stack, (Decoder, DepthLSTMDecoder))
    with _evaluating(model), site.watched(note):
        if isinstance(model, TranslationModel):
            for src, tgt in batches:
                keep = (tgt[:, 1:] if decodes else src) != model.pad_id
                if decodes:
                    model(src, tgt[:, :-1], return_hidden=True)
                else:
                    model.encode(src)
            return moments
        hook = stack.register_forward_pre_hook(mask, with_kwargs=True)
        try:
            for batch in batches:
                model(*batch)
        finally:
            hook.remove()
    return moments


def _kept(stack: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
    """Which tokens (batch, length) of a stack's call are none of padding, by its mask."""
    given = inspect.signature(type(stack).forward).bind(stack, *arguments, **options).arguments
    name = "tgt_key_padding_mask" if "tgt" in given else "src_key_padding_mask"
    padding = given.get(name)
    if padding is None:
        return None
    padding = padding if padding.dim() == 2 else padding[None]
    return ~padding if padding.dtype == torch.bool else padding != -math.inf


def _tune(
    model: nn.Module,
    copied: nn.Module,
    maps: dict[str, Any],
    batches: list[Batch],
    steps: int,
    learning_rate: float,
) -> tuple[float, ...]:
    """Train the maps alone; return the divergence at each step."""
    full: Any = copy.deepcopy(model)
    trained = [parameter for each in maps.values() for parameter in each.parameters()]
    wanted = {parameter: parameter.requires_grad for parameter in copied.parameters()}
    optimiser = torch.optim.Adam(trained, lr=learning_rate)
    found = []
    with _evaluating(full), _evaluating(copied), torch.enable_grad():
        copied.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in range(steps):
            src, tgt = batches[step % len(batches)]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            with torch.no_grad():
                likely = log_probabilities(full(src, tgt[:, :-1]))
            keep = tgt[:, 1:] != full.pad_id
            given = log_probabilities(copied(src, tgt[:, :-1]))
            loss = F.kl_div(given[keep], likely[keep], log_target=True, reduction="sum") / keep.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
    for parameter, needs in wanted.items():
        parameter.requires_grad_(needs)
        parameter.grad = None
    return tuple(found)
