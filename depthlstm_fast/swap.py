"""Fuse the depth-wise LSTM cells of an existing model in place, and undo it.

Where possible a module only gets another class. The object, its parameters, buffers, hooks and names stay. Optimisers,
state_dicts and references to the module keep working, for the root of the model too. The original class's ``forward``
runs calls that the fused class does not cover (a hook on a submodule, an additional argument).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers, models, reference
from .callable_module import make_callable
from .functional import depth_lstm_cell, depth_lstm_gates
from .plain import hookless, is_plain_linear

Rules = Mapping[Any, Callable[[nn.Module], nn.Module]]

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    reference.DepthLSTMCell: layers.DepthLSTMCell,
    reference.DepthLSTMEncoderLayer: layers.DepthLSTMEncoderLayer,
    reference.DepthLSTMDecoderLayer: layers.DepthLSTMDecoderLayer,
    reference.DepthLSTMEncoder: layers.DepthLSTMEncoder,
    reference.DepthLSTMDecoder: layers.DepthLSTMDecoder,
    reference.DepthLSTMTransformer: models.DepthLSTMTransformer,
}
# Keys that swap leaves in a module's __dict__, so that unswap also finds them in copies of the model.
_CLASS, _ORIGINAL = "_depthlstm_swapped_class", "_depthlstm_swapped_module"


class Swapped(NamedTuple):
    """A changed module: its name in the model ("" for the model itself), and its class before and after."""

    name: str
    before: str
    after: str


class Left(NamedTuple):
    """A module that looks like a depth-wise LSTM cell but was left as it is, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass
class SwapReport:
    """The result of :func:`swap` or :func:`unswap`.

    It lists the changed modules, the modules left alone, and the names of those that were fused before.
    """

    changed: list[Swapped] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} changed, {len(self.left)} left, {len(self.already)} fused before"]
        names = [entry.name for entry in self.changed] + [entry.name for entry in self.left]
        width = max((len(name or "(model)") for name in names), default=0)
        lines += [
            f"  changed  {entry.name or '(model)':{width}}  {entry.before} -> {entry.after}" for entry in self.changed
        ]
        lines += [f"  left     {entry.name or '(model)':{width}}  {entry.kind}: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def _activation_name(act: Any) -> str | None:
    """Return the name of a fusible activation module or function; None for any other."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    modules: dict[Any, str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}
    functions: dict[Any, str] = {F.gelu: "gelu", F.silu: "silu"}
    functions.update(dict.fromkeys((F.relu, torch.relu), "relu"))
    functions.update(dict.fromkeys((F.tanh, torch.tanh), "tanh"))
    functions.update(dict.fromkeys((F.sigmoid, torch.sigmoid), "sigmoid"))
    return modules.get(type(act)) if isinstance(act, nn.Module) else functions.get(act) if callable(act) else None


class _Parts(NamedTuple):
    """The attribute names of a cell of the LSTMCell4RNMT shape."""

    projection: str = "trans"
    norm: str = "normer"
    activation: str = "act"
    dropout: str = "drop"


def _obstacle(module: nn.Module, parts: _Parts) -> str | None:
    """Say why ``module`` is not a fusible cell of this shape; None if it is."""
    projection, norm = getattr(module, parts.projection, None), getattr(module, parts.norm, None)
    if not isinstance(projection, nn.Linear):
        return f"{parts.projection} must be an nn.Linear; found {type(projection).__name__}"
    if type(norm) is not nn.LayerNorm:
        return f"{parts.norm} must be an nn.LayerNorm; found {type(norm).__name__}"
    shape = tuple(norm.normalized_shape)
    if len(shape) != 2 or shape[0] != 4:
        return f"{parts.norm} must normalise over (4, D); found {shape}"
    if projection.out_features != 4 * shape[1] or projection.in_features <= shape[1]:
        wanted = f"{4 * shape[1]} rows and more than {shape[1]} columns"
        return f"{parts.projection} must have {wanted}; found ({projection.out_features}, {projection.in_features})"
    if (norm.weight is None) != (norm.bias is None):
        return f"{parts.norm} must have both weight and bias, or neither"
    act = getattr(module, parts.activation, None)
    if _activation_name(act) is None:
        return (
            f"{parts.activation} must be GELU, ReLU, Tanh, SiLU or Sigmoid; "
            f"found {getattr(act, '__name__', type(act).__name__)}"
        )
    drop = getattr(module, parts.dropout, None)
    if drop is not None and type(drop) is not nn.Dropout:
        return f"{parts.dropout} must be an nn.Dropout or None; found {type(drop).__name__}"
    if drop is not None and not 0 <= drop.p < 1:
        return f"{parts.dropout} must drop with a probability in [0, 1); found {drop.p}"
    return None


class _FusedRNMTCell(nn.Module):
    """Base placed before a cell's class; it fuses the cell's forward(input, (h, c)) -> (h, c)."""

    _plain_class: type[nn.Module]
    _parts: _Parts

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor], *rest: Any, **named: Any) -> Any:
        parts = self._parts
        projection, norm = getattr(self, parts.projection), getattr(self, parts.norm)
        act, drop = getattr(self, parts.activation), getattr(self, parts.dropout, None)
        inner = [module for module in (norm, act, drop) if isinstance(module, nn.Module)]
        activation = _activation_name(act)
        if rest or named or activation is None or type(norm) is not nn.LayerNorm or not all(map(hookless, inner)):
            return super().forward(input, state, *rest, **named)
        h, c = state
        c = c.expand_as(h)
        options: dict[str, Any] = {"norm": "joint", "activation": activation, "eps": norm.eps}
        if drop is not None:
            options.update(dropout_p=drop.p, training=drop.training)
        if is_plain_linear(projection):
            return depth_lstm_cell(input, h, c, projection.weight, projection.bias, norm.weight, norm.bias, **options)
        return depth_lstm_gates(projection(torch.cat((input, h), -1)), c, norm.weight, norm.bias, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so a pickle names the original one
        return _new_fused_cell, (self._plain_class, tuple(self._parts)), self.__dict__


_fused_cells: dict[tuple[type[nn.Module], _Parts], type[nn.Module]] = {}


def _fused_cell_class(plain: type[nn.Module], parts: _Parts) -> type[nn.Module]:
    key = (plain, parts)
    if key not in _fused_cells:
        members = {"_plain_class": plain, "_parts": parts, "__module__": __name__, "__doc__": plain.__doc__}
        _fused_cells[key] = type(f"Fused{plain.__name__}", (_FusedRNMTCell, plain), members)
    return _fused_cells[key]


def _new_fused_cell(plain: type[nn.Module], parts: tuple[str, ...]) -> nn.Module:
    cls = _fused_cell_class(plain, _Parts(*parts))
    return cls.__new__(cls)


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__dict__[_CLASS] = type(module)
    module.__class__ = cls


@torch.no_grad()
def _computes_another(module: nn.Module, fused: type[nn.Module], parts: _Parts) -> str | None:
    """Say how ``module`` differs from the fused class on random numbers; None where it does not.

    Attributes alone do not show a formula.
    """
    weight: Tensor = getattr(module, parts.projection).weight
    if weight.is_meta:
        return None
    features = weight.shape[0] // 4
    generator = torch.Generator("cpu").manual_seed(0)
    x, h, c = (
        torch.randn(3, size, generator=generator, device="cpu").to(weight.device, weight.dtype)
        for size in (weight.shape[1] - features, features, features)
    )
    training = [inner for inner in module.modules() if inner.training]
    plain = type(module)
    try:
        for inner in training:
            inner.training = False
        wanted = plain.forward(module, x, (h, c))
        module.__class__ = fused
        found = module.forward(x, (h, c))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"forward(input, (h, c)) raises {type(error).__name__}: {error}"
    finally:
        module.__class__ = plain
        for inner in training:
            inner.training = True
    tolerance = 1e-9 if weight.dtype == torch.float64 else 1e-3 if weight.dtype == torch.float32 else 5e-2
    if (
        isinstance(wanted, tuple)
        and len(wanted) == 2
        and all(isinstance(w, Tensor) and w.shape == h.shape for w in wanted)
    ):
        if all(
            torch.allclose(f.float(), w.float(), rtol=tolerance, atol=tolerance)
            for f, w in zip(found, wanted, strict=True)
        ):
            return None
        return "it has the attributes of the cell but computes something else"
    return "forward(input, (h, c)) does not return (h, c)"


def swap_rnmt_cell(
    module: nn.Module,
    *,
    projection: str = "trans",
    norm: str = "normer",
    activation: str = "act",
    dropout: str = "drop",
) -> nn.Module:
    """Fuse one cell of the ``LSTMCell4RNMT`` shape in place.

        z = projection([x ; h'])                 nn.Linear(I + D, 4D), rows in the order i, f, o, g
        i, f, o, g = norm(z as (..., 4, D))      nn.LayerNorm((4, D)): statistics over all four (``norm="joint"`` here)
        c = sigmoid(f) c' + sigmoid(i) dropout(activation(g)),    h = sigmoid(o) c

    The cell's forward is forward(x, (h', c')) -> (h, c). Three rows of random numbers check that ``module`` computes
    this. The function serves as a rule for :func:`swap` where attributes have other names. Dropout keeps its
    probability, but draws its masks from a counter-based generator seeded by torch's.

    Args:
        module: the cell.
        projection, norm, activation, dropout: the names of its attributes.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: ``module`` is not such a cell, with the reason.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; found {type(module).__name__}")
    parts = _Parts(projection, norm, activation, dropout)
    if isinstance(module, _FusedRNMTCell):
        return module
    reason = _obstacle(module, parts)
    if reason is None:
        fused = _fused_cell_class(type(module), parts)
        reason = _computes_another(module, fused, parts)
        if reason is None:
            _change_class(module, fused)
            return module
    raise ValueError(reason)


def _fuse(module: nn.Module, rules: Rules) -> nn.Module | None:
    """Return the fused form of ``module``, which is ``module`` itself if changed in place.

    The result is None for a module that is no candidate. A ValueError gives the reason to leave a candidate.
    """
    for match, build in rules.items():
        if isinstance(module, match) if isinstance(match, type) else match(module):
            built = build(module)
            if not isinstance(built, nn.Module):
                raise TypeError(
                    f"the rule for {type(module).__name__} must return a torch.nn.Module; found {type(built).__name__}"
                )
            return built
    cls = type(module)
    if cls in _FUSED:
        _change_class(module, _FUSED[cls])
        return module
    if isinstance(module, tuple(_FUSED)):
        raise ValueError("a subclass may change what the fused class replaces; give a rule for it")
    if hasattr(module, "trans") and hasattr(module, "normer"):
        return swap_rnmt_cell(module)
    return None


def _is_fused(module: nn.Module) -> bool:
    marked = _CLASS in module.__dict__ or _ORIGINAL in module.__dict__
    return marked or isinstance(module, (_FusedRNMTCell, *_FUSED.values()))


def swap(model: nn.Module, rules: Rules | None = None) -> SwapReport:
    """Replace the depth-wise LSTM cells and layers in ``model`` by fused ones, in place.

    Modules of :mod:`depthlstm_fast.reference` become their fused twins. Cells of the ``LSTMCell4RNMT`` shape are fused
    as :func:`swap_rnmt_cell` says. Their attributes and their results identify them. Parameters are shared: the same
    objects under the same names. A module used in several places is changed once. A second call changes nothing.

    Args:
        model: any module; it may itself be swapped.
        rules: a dict from a module class, or a predicate of a module, to a function; tried before the rules above. The
            function takes a matching module and returns the module for its place, or the same module changed in place.
            The result must have the parameters of the given module. A ValueError of the function is a reason to leave
            the module.

    Returns:
        A :class:`SwapReport`; print it.

    Raises:
        ValueError: nothing in ``model`` can be swapped, or ``model`` itself matches a rule that returns another object.
        TypeError: ``model`` is not a module, or a rule returned none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(
            f"rules must be a dict from classes or predicates to functions, or None; found {type(rules).__name__}"
        )
    for match, build in (rules or {}).items():
        if not callable(match) or not callable(build):
            raise TypeError(f"rules must hold classes or predicates, and functions; found {{{match!r}: {build!r}}}")
    report = SwapReport()
    done: dict[nn.Module, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        done[module] = module
        before = type(module).__name__
        result: nn.Module | None = None
        if _is_fused(module):
            report.already.append(name)
            if _ORIGINAL in module.__dict__:
                return module
        else:
            try:
                result = _fuse(module, rules or {})
            except ValueError as error:
                report.left.append(Left(name, before, str(error)))
        if result is not None:
            report.changed.append(Swapped(name, before, type(result).__name__))
            if result is not module:
                if module is model:
                    raise ValueError(
                        f"model itself is a {before} that its rule replaces by "
                        f"another object; call the rule on it instead"
                    )
                result.train(module.training)
                result.__dict__[_ORIGINAL] = (module,)  # the tuple keeps it from becoming a submodule
                done[module] = done[result] = result
                return result
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = visit(f"{name}.{child_name}" if name else child_name, child)
        return module

    visit("", model)
    if not report.changed and not report.already:
        reasons = "".join(f"\n  {entry.name or '(model)'}, {entry.kind}: {entry.reason}" for entry in report.left)
        raise ValueError(f"model holds no module that a rule matches; found {type(model).__name__}{reasons}")
    return report


def unswap(model: nn.Module) -> SwapReport:
    """Undo :func:`swap`: give every module its class, or its place, back.

    Parameters keep their values.

    Returns:
        A :class:`SwapReport` of the changes.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    report = SwapReport()
    done: dict[nn.Module, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> nn.Module:
        if module in done:
            return done[module]
        done[module] = module
        before = type(module).__name__
        if _ORIGINAL in module.__dict__:
            (original,) = module.__dict__.pop(_ORIGINAL)
            original.train(module.training)
            report.changed.append(Swapped(name, before, type(original).__name__))
            done[module] = done[original] = original
            return original
        if _CLASS in module.__dict__:
            module.__class__ = module.__dict__.pop(_CLASS)
            report.changed.append(Swapped(name, before, type(module).__name__))
        for child_name, child in list(module._modules.items()):
            if child is not None:
                module._modules[child_name] = visit(f"{name}.{child_name}" if name else child_name, child)
        return module

    visit("", model)
    return report


make_callable(swap, __name__)
