"""Modules that share their name with a function of the package: ``dl.swap(model)`` and ``import depthlstm_fast.swap``
are both right.

``import depthlstm_fast.swap as module`` reads the attribute of the package, where the function alone would stand in the
module's place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called as its function of the same name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]](*arguments, **options)


def make_callable(function: Callable[..., Any], name: str) -> None:
    """Let the module ``name``, which has the name of ``function``, be called as it, with its signature and
    docstring.
    """
    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__doc__ = function.__doc__
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
