"""The machine and the software that a run's numbers belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import depthlstm_fast as dl
from depthlstm_fast.__main__ import chosen_isa, cpu_info, package_version

from .. import CHECKOUT


def last_level_cache() -> str:
    """Return the size of the first core's largest cache, such as "32768K"; "unknown" if the system does not say."""
    found = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        found[int((index / "level").read_text())] = (index / "size").read_text().strip()
    return found[max(found)] if found else "unknown"


def memory_gib() -> float | None:
    """Return the physical memory in GiB; None if the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def operating_system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _git(*arguments: str) -> str | None:
    """Return git's answer about the source tree; None for an installed package.

    An installed package may lie inside another repository.
    """
    if CHECKOUT is None:
        return None
    try:
        return subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def slug(model: str, cores: int) -> str:
    """Return a folder name for a machine: "Some CPU @ 2.0GHz", 2 -> "some-cpu-2.0ghz-2-cores"."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", model.lower())).strip("-") + f"-{cores}-cores"


def gpu_slug(name: str) -> str:
    """Return a folder name for a GPU: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def driver() -> str:
    """Return the GPU driver's version; "unknown" if nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return lines[0].strip() if lines else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Return the result of :func:`describe` with the GPU; on the CPU without one."""
    about = describe()
    # identifies the commit for a copy of the tree without its history
    about["commit"] = about["commit"] or os.environ.get("DEPTHLSTM_COMMIT")
    about["triton"] = package_version("triton")
    if device.type != "cuda":
        return about | {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "name": gpu_slug(properties.name),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_cache_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def describe() -> dict[str, Any]:
    """Return everything that a reader needs to judge a number, fit for JSON."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "name": slug(cpu_model(), usable_cores()),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "isa": chosen_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "memory_gib": memory_gib(),
        "os": operating_system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "depthlstm_fast": dl.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
