"""Kill the language model example's train.py ten times at random moments, and let it go on each time.

    python kill_runs.py EXAMPLE SEED WHOLE KILLED ARGUMENT ...

WHOLE is the folder of an unbroken run, and the arguments are train.py's. Programs are forked from this process, which
has imported what they need and computed nothing, so that each starts at once. Moments are seconds of computing, from
the start of a program on, so that other load does not move them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

KILLS = 10
TICK = 1 / os.sysconf("SC_CLK_TCK")


def start(main: Callable[[list[str]], int], arguments: list[str], output: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os._exit(main(arguments))


def computed(child: int) -> float:
    """Return the seconds that ``child`` has computed; infinity if it has ended."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return float("inf") if fields[0] in "ZX" else TICK * (int(fields[11]) + int(fields[12]))


def main() -> None:
    folder, seed, whole, killed, *arguments = sys.argv[1:]
    sys.path.insert(0, folder)
    import torch._dynamo  # noqa: F401 - an optimiser imports it, which takes longer than a run
    import train

    def begin(run: str) -> int:
        return start(train.main, [*arguments, "--output", run], Path(run).with_suffix(".txt"))

    _, status, usage = os.wait4(begin(whole), 0)
    if status:
        sys.exit(f"the unbroken run ended with {status}")
    draws, longest, signals = random.Random(int(seed)), (usage.ru_utime + usage.ru_stime) / 8, []
    for _ in range(KILLS):
        child, moment = begin(killed), draws.uniform(0, longest)
        while computed(child) < moment:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, TICK))
        os.kill(child, signal.SIGKILL)
        signals.append(os.WTERMSIG(os.waitpid(child, 0)[1]))  # 0 for one that had ended by itself
    print(json.dumps({"signals": signals, "last_status": os.waitpid(begin(killed), 0)[1]}))


if __name__ == "__main__":
    main()
