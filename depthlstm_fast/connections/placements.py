"""One stream and its norms: pre-norm, post-norm, sandwich-norm, DeepNorm, Keel, ReZero, LayerScale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..functional import norm_step
from .base import Connection, State, affines_of, make_norms


class _Placement(Connection):
    """x' = [N1](a x + b [N3] F([N2] x)), and a norm on the output or none.

    The norms are ``sum_norms`` (N1), ``read_norms`` (N2) and ``branch_norms`` (N3), each a list with one for each
    branch, and ``final_norm``. A placement has some of them.
    """

    has_read_norms = has_branch_norms = has_sum_norms = has_final_norm = False
    a = 1.0

    def __init__(self, d_model: int, num_branches: int, *, norm: str = "layer", eps: float = 1e-6) -> None:
        super().__init__(d_model, num_branches)
        self.norm, self.eps = norm, eps

        def norms(there: bool) -> nn.ModuleList | None:
            return make_norms(num_branches, d_model, norm, eps) if there else None

        self.read_norms = norms(self.has_read_norms)
        self.branch_norms = norms(self.has_branch_norms)
        self.sum_norms = norms(self.has_sum_norms)
        self.final_norm = make_norms(1, d_model, norm, eps)[0] if self.has_final_norm else None

    def _scale(self, i: int) -> float | Tensor:
        """b of branch i."""
        return 1.0

    def _advance(self, x: Tensor, y: Tensor, i: int, following: nn.Module | None) -> tuple[Tensor, Tensor]:
        after = None if self.sum_norms is None else self.sum_norms[i]
        inner = None if self.branch_norms is None else self.branch_norms[i]
        affines = affines_of({"1": after, "2": following, "3": inner})
        if affines is not None:
            return norm_step(x, y, a=self.a, b=self._scale(i), norm=self.norm, eps=self.eps, **affines)
        x, _ = norm_step(x, y if inner is None else inner(y), a=self.a, b=self._scale(i))
        x = x if after is None else after(x)
        return x, x if following is None else following(x)

    def read(self, state: State, i: int) -> Tensor:
        return state[0] if self.read_norms is None else self.read_norms[i](state[0])

    def write(self, state: State, y: Tensor, i: int) -> State:
        return (self._advance(state[0], y, i, None)[0],)

    def step(self, state: State, y: Tensor, i: int) -> tuple[State, Tensor]:
        x, u = self._advance(state[0], y, i, None if self.read_norms is None else self.read_norms[i + 1])
        return (x,), u

    def finish(self, state: State) -> Tensor:
        return state[0] if self.final_norm is None else self.final_norm(state[0])

    def _elements(self) -> int:
        branches = self.num_branches
        read = 2 if self.has_read_norms else 0
        step = 4 if self.has_read_norms else 3
        return read + step * (branches - 1) + 3 + (2 if self.has_final_norm else 0)


class PreNorm(_Placement):
    """x' = x + F(N x), and N of the output: Xiong et al., arXiv 2002.04745.

    Args:
        d_model, num_branches: see :class:`Connection`.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: of every norm.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    has_read_norms = has_final_norm = is_identity_at_init = True


class PostNorm(_Placement):
    """x' = N(x + F(x)): Vaswani et al., 2017. The arguments are those of :class:`PreNorm`."""

    has_sum_norms = True


class SandwichNorm(_Placement):
    """x' = x + N(F(N x)), and N of the output: Ding et al., arXiv 2105.13290. The arguments are those of
    :class:`PreNorm`.
    """

    has_read_norms = has_branch_norms = has_final_norm = True


class DeepNorm(_Placement):
    """x' = N(a x + F(x)): Wang et al., arXiv 2203.00555.

    Args:
        d_model, num_branches, norm, eps: see :class:`PreNorm`.
        alpha: a; num_branches ** 0.25 if None. That is (2N) ** 0.25 for N layers of two branches, and (3M) ** 0.25
            for M decoder layers of three. :class:`depthlstm_fast.Transformer` gives its encoder the paper's
            0.81 (N^4 M) ** (1/16). The weights' scale is ``init="deepnorm"``.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    has_sum_norms = True

    def __init__(
        self, d_model: int, num_branches: int, *, alpha: float | None = None, norm: str = "layer", eps: float = 1e-6
    ) -> None:
        super().__init__(d_model, num_branches, norm=norm, eps=eps)
        if alpha is not None:
            checks.check_initial("alpha", alpha)
        self.a = num_branches**0.25 if alpha is None else alpha

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.a:.4g}"


class Keel(_Placement):
    """x' = N(L x + F(N x)), L the number of branches, and no norm of the output: arXiv 2601.19895. The arguments are
    those of :class:`PreNorm`.
    """

    has_read_norms = has_sum_norms = True

    def __init__(self, d_model: int, num_branches: int, *, norm: str = "layer", eps: float = 1e-6) -> None:
        super().__init__(d_model, num_branches, norm=norm, eps=eps)
        self.a = float(num_branches)


class ReZero(_Placement):
    """x' = x + alpha_i F(N x), alpha_i = 0 at the start, and N of the output: Bachlechner et al., arXiv 2003.04887.

    The paper has no norm inside. The arguments are those of :class:`PreNorm`. Parameter: ``alpha`` (num_branches,).
    """

    has_read_norms = has_final_norm = True

    def __init__(self, d_model: int, num_branches: int, *, norm: str = "layer", eps: float = 1e-6) -> None:
        super().__init__(d_model, num_branches, norm=norm, eps=eps)
        self.alpha = nn.Parameter(torch.zeros(num_branches))

    def _scale(self, i: int) -> Tensor:
        return self.alpha[i]

    def no_weight_decay(self) -> set[str]:
        return {"alpha"}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.alpha)


class LayerScale(_Placement):
    """x' = x + gamma_i * F(N x), gamma_i for each feature, and N of the output: Touvron et al., arXiv 2103.17239.

    Args:
        d_model, num_branches, norm, eps: see :class:`PreNorm`.
        init_value: of gamma. The paper takes 0.1 up to 18 layers, 1e-5 up to 24, and 1e-6 beyond.

    Parameter: ``gamma`` (num_branches, C).

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted.
    """

    has_read_norms = has_final_norm = True

    def __init__(
        self, d_model: int, num_branches: int, *, init_value: float = 0.1, norm: str = "layer", eps: float = 1e-6
    ) -> None:
        super().__init__(d_model, num_branches, norm=norm, eps=eps)
        checks.check_initial("init_value", init_value)
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.full((num_branches, d_model), float(init_value)))

    def _scale(self, i: int) -> Tensor:
        return self.gamma[i]

    def no_weight_decay(self) -> set[str]:
        return {"gamma"}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.gamma, self.init_value)
