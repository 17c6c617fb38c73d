"""torch.distributed with two gloo processes.

The tests cover data, tensor and pipeline parallelism, sharded parameters and checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from client_helpers import batch, cotangent, model

import depthlstm_fast as dl

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

SCRIPT = Path(__file__).with_name("two_processes.py")
FILES = (SCRIPT, SCRIPT.with_name("two_processes_language_model.py"))
CHECKS = [name for file in FILES for name in re.findall(r"^def check_(\w+)", file.read_text(), re.MULTILINE)]
PAGE = SCRIPT.parents[2] / "docs" / "scale.md"
LOADING = "loading"  # runs in three processes


def run(path: Path, world: int, names: list[str]) -> None:
    """Run the checks in ``world`` processes, which write what they find into ``path``."""
    places = [str(SCRIPT.parent), str(Path(dl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(places),
    }
    command = [sys.executable, str(SCRIPT), str(path), str(world)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *names], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=300)[0])
    finally:
        for process in processes:
            process.kill()
    (path / "output.txt").write_text("\n".join(outputs))


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the results of the two processes, from one run of all selected checks."""
    path = tmp_path_factory.mktemp("two")
    selected = [name for name in CHECKS if any(f"[{name}]" in item.name for item in request.session.items)]
    names = selected if any("test_check[" in item.name for item in request.session.items) else []
    names = names if "checkpoint" in names else [*names, "checkpoint"]
    run(path, 2, names)
    return path


def assert_ok(folder: Path, name: str, world: int = 2) -> None:
    """Check that no process found a fault."""
    wrong = []
    for rank in range(world):
        path = folder / f"results{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        found = results.get(name, f"process {rank} did not come to it; it ended with {list(results.items())[-1:]}")
        if found != "ok":
            wrong.append(found)
    if wrong:
        pytest.fail("\n".join([*wrong, (folder / "output.txt").read_text()]), pytrace=False)


@pytest.mark.parametrize("name", [name for name in CHECKS if name != LOADING])
def test_check(name: str, folder: Path) -> None:
    if name == "pipeline_language_model" and not PAGE.is_file():
        pytest.skip("no checkout, whose page has the stage")
    assert_ok(folder, name)


def test_checkpoint_of_two_is_loaded_by_one(folder: Path) -> None:
    """Check that model and optimiser continue as in the two processes."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    assert_ok(folder, "checkpoint")
    torch.manual_seed(9)
    loaded = model()
    optimizer = torch.optim.AdamW(dl.param_groups(loaded), 1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(loaded, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(loaded, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert loaded.output.weight is loaded.tgt_embedding.weight
    loaded.zero_grad()
    loaded(*batch()).backward(cotangent())
    optimizer.step()
    after = torch.load(folder / "after.pt")
    for name, parameter in loaded.named_parameters():
        if name.endswith(("in_proj.bias", "kv_proj.bias")):
            continue  # keys' biases have only rounding as gradient, and Adam makes steps of it
        torch.testing.assert_close(parameter.detach(), after[name], rtol=1e-3, atol=1e-4)


def test_checkpoint_of_two_goes_through_one_into_three(folder: Path, tmp_path: Path) -> None:
    """Check that three processes hold what two have saved, after one process has loaded it and saved it again."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    assert_ok(folder, "checkpoint")
    torch.manual_seed(9)
    loaded = model()
    optimizer = torch.optim.AdamW(dl.param_groups(loaded), 1e-2)
    state = dict(zip(("model", "optimizer"), get_state_dict(loaded, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(loaded, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    states = get_state_dict(loaded, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path / "one", no_dist=True)
    run(tmp_path, 3, [LOADING])
    assert_ok(tmp_path, LOADING, 3)
    found = torch.load(tmp_path / "loaded.pt")
    moments = {name: optimizer.state[parameter] for name, parameter in loaded.named_parameters()}
    assert len(found) == len(moments)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(found[name][0], parameter.detach()), name
        assert torch.equal(found[name][1], moments[name]["exp_avg_sq"]), name
