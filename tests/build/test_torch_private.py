"""Private names of torch.

The installed torch has each name, one file has all of them, and the package works without them.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import depthlstm_fast as dl
from depthlstm_fast import torch_private

PACKAGE = Path(dl.__file__).resolve().parent


@pytest.mark.parametrize("path", torch_private.NAMES)
def test_the_running_torch_has_it(path: str) -> None:
    if path == "compiler._is_exporting_flag":
        assert torch_private.is_export_flag_set() is False
    functools.reduce(getattr, path.split("."), torch)


def private_names(source: str) -> set[str]:
    """Return the torch names with a leading underscore in a source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            names = [f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        found |= {name for name in names if re.match(r"torch(\.\w+)*\._[a-zA-Z]", name)}
    return found


def test_no_other_file_has_any() -> None:
    assert private_names("import torch._dynamo\nfrom torch import _C\nx = torch.autograd._hidden()") == {
        "torch._dynamo",
        "torch._C",
        "torch.autograd._hidden",
    }
    found = {}
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "bench"]
        for path in (Path(folder, name) for name in files if name.endswith(".py") and name != "torch_private.py"):
            if names := private_names(path.read_text(encoding="utf-8")):
                found[path.name] = names
    assert not found


WITHOUT = """
import builtins, sys
import torch
real = getattr
def hidden(owner, name, *default):
    ours = sys._getframe(1).f_globals["__name__"] == "depthlstm_fast.torch_private"
    if ours and default and any(path.endswith("." + name) for path in sys.argv[1:]):
        return default[0]
    return real(owner, name, *default)
builtins.getattr = hidden  # torch itself goes on using its names
import depthlstm_fast as dl
from depthlstm_fast import torch_private
assert torch_private.is_transformed() is False
assert torch_private.dispatch_modes() == 1
assert torch_private.has_saved_tensor_hooks()
z, c = torch.randn(5, 32, requires_grad=True), torch.randn(5, 8, requires_grad=True)
x, h, w = torch.randn(5, 3), torch.randn(5, 8), torch.randn(32, 11, requires_grad=True)
for backend in ("auto", "reference"):
    with dl.use_backend(backend):
        outputs = dl.depth_lstm_gates(z, c)
        outputs = (*outputs, *dl.depth_lstm_cell(x, h, c, w))
        found = torch.autograd.grad(outputs, (z, c, w), [torch.ones_like(output) for output in outputs])
        if backend == "auto":
            first = found
for a, b in zip(first, found, strict=True):
    torch.testing.assert_close(a, b)
h, _ = dl.depth_lstm_gates(z, c)
(gradient,) = torch.autograd.grad(h.square().sum(), z, create_graph=True)
if dl.last_backend() != "reference":
    try:
        torch.autograd.grad(gradient.sum(), z)
    except RuntimeError as error:
        assert "differentiate twice" in str(error), error
    else:
        raise SystemExit("a second derivative was given")
print("right without them")
"""


def test_right_without_them() -> None:
    """Check a torch without the names: slower, with the same values."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-c", WITHOUT, *torch_private.NAMES]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert run.stdout.strip().endswith("right without them"), run.stderr
