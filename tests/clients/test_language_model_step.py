"""A language model's step with its cache as tensors: torch.export, AOTInductor without this package, ONNX.

The tests were run with onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import depthlstm_fast as dl

VOCAB, PROMPT, STEPS = 31, 4, 8
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]
CONNECTIONS = ("depth-lstm", "pre-norm", "dlcl")


def model(connection: str = "depth-lstm", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "nhead": 4,
        "kv_heads": 2,
        "num_layers": 2,
        "max_len": 32,
        "eos_id": None,
        "tie_output": False,
    }
    made = dl.LanguageModel(VOCAB, connection=connection, **{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        made.output.weight.normal_()
    return made


def prompt(rows: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(1))


def continued(start: Step, step: Step, ids: Tensor) -> Tensor:
    """The likeliest ``STEPS`` tokens after ids: ``start`` takes the prompt, ``step`` one token and the cache."""
    logits, keys, values = start(ids)
    tokens = [logits.argmax(-1)]
    while len(tokens) < STEPS:
        logits, keys, values = step(tokens[-1][:, None], keys, values)
        tokens.append(logits.argmax(-1))
    return torch.stack(tokens, 1)


def example(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A token and a cache of three."""
    keys, values = torch.randn(2, 2, rows, 2, 3, 4).unbind()
    return torch.full((rows, 1), 5), keys, values


def shapes() -> tuple[Any, ...]:
    rows, seen = torch.export.Dim("rows", max=64), torch.export.Dim("seen", max=31)
    return {0: rows}, {1: rows, 3: seen}, {1: rows, 3: seen}


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_step_is_generate(connection: str) -> None:
    each = model(connection)
    step = dl.LanguageModelStep(each)
    for rows in (1, 3):
        wanted = each.generate(prompt(rows), STEPS)
        assert len(wanted[0].unique()) > 1  # one token over and over would test nothing
        with torch.no_grad():
            assert torch.equal(continued(step, step, prompt(rows)), wanted)


def test_prompt_in_pieces() -> None:
    step, ids = dl.LanguageModelStep(model()), prompt()
    with torch.no_grad():
        wanted = step(ids)
        _, keys, values = step(ids[:, :2])
        before = keys.clone()
        found = step(ids[:, 2:], keys, values)
    assert torch.equal(keys, before)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_exported_step(connection: str) -> None:
    each = model(connection)
    step = dl.LanguageModelStep(each)
    exported = torch.export.export(step, example(), dynamic_shapes=shapes()).module()
    for rows in (2, 3):
        with torch.no_grad():
            assert torch.equal(continued(step, exported, prompt(rows)), each.generate(prompt(rows), STEPS))


ALONE = """
import sys, torch
step = torch._inductor.aoti_load_package(sys.argv[1])
given = torch.load(sys.argv[2])
logits, keys, values = step(*given["inputs"])
torch.testing.assert_close((logits, keys, values), given["wanted"], rtol=1e-4, atol=1e-5)
assert not any(name.startswith("depthlstm_fast") for name in sys.modules)
print("alone")
"""


@pytest.mark.slow
def test_package_of_aotinductor_runs_without_this_package(tmp_path: Path) -> None:
    step = dl.LanguageModelStep(model())
    with torch.no_grad():
        exported = torch.export.export(step, example(), dynamic_shapes=shapes())
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "step.pt2"))
        _, keys, values = step(prompt(3))
        inputs = (torch.tensor([[4], [7], [9]]), keys, values)
        torch.save({"inputs": inputs, "wanted": step(*inputs)}, tmp_path / "given.pt")
    command = [sys.executable, "-I", "-c", ALONE, path, str(tmp_path / "given.pt")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "alone\n", found.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_step_in_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    each = model()
    step = dl.LanguageModelStep(each)
    path = tmp_path / "step.onnx"
    torch.onnx.export(step, example(), path, dynamo=True, dynamic_shapes=shapes(), verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fed = dict(zip(names, [tensor.numpy() for tensor in inputs], strict=True))
        logits, keys, values = (torch.from_numpy(each) for each in session.run(None, fed))
        return logits, keys, values

    with torch.no_grad():
        assert torch.equal(continued(step, run, prompt(3)), each.generate(prompt(3), STEPS))


def test_wrong_arguments() -> None:
    each = model()
    step, (ids, keys, values) = dl.LanguageModelStep(each), example()
    with pytest.raises(TypeError, match="model must be a LanguageModel; found Linear"):
        dl.LanguageModelStep(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="values must be given with keys, or both be None; found values=None"):
        step(ids, keys)
    with pytest.raises(ValueError, match=r"keys must have shape \(layers, batch, kv_heads, S, size\); found \(2, 2"):
        step(ids, keys[..., 0], values)
    with pytest.raises(ValueError, match=r"keys must have shape \(2, 2, 2, 3, 4\); found \(1, 2, 2, 3, 4\)"):
        step(ids, keys[:1], values[:1])
    with pytest.raises(ValueError, match=r"values must have shape \(2, 2, 2, 3, 4\); found \(2, 2, 2, 2, 4\)"):
        step(ids, keys, values[:, :, :, 1:])
    with pytest.raises(TypeError, match="values must be float32 beside a float32 keys; found float64"):
        step(ids, keys, values.double())
    with pytest.raises(TypeError, match="keys must be float32 beside a float32 model; found float64"):
        step(ids, keys.double(), values.double())
    with pytest.raises(ValueError, match="keys must be on the device of model, cpu; found meta"):
        step(ids, keys.to("meta"), values.to("meta"))
    with pytest.raises(TypeError, match=r"ids must be a torch\.Tensor; found str"):
        step("abc", keys, values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids must have at most max_len, 32, tokens with those of the cache; found 33"):
        step(ids, *torch.zeros(2, 2, 2, 2, 32, 4).unbind())
