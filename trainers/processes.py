"""Several processes for one run: who starts them, which one this is, and what happens when one of them is lost.

A launcher (srun, torchrun, mpirun, or a person with LOCAL_RANK set) may have started them already.  Otherwise the first
process starts the others of its machine before anything is loaded, so that all of them load side by side.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from trainers.config import RecipeBase
from trainers.launch import current_launch

GRACE_SECONDS = 20.0
"""How long the others may take to notice a lost process by themselves before they are ended."""

_POLL_SECONDS = 0.5
_STARTED_BY = "AFTERBURNER_STARTED_BY"


def started_by_launcher() -> bool:
    """Whether something else started this process as one of several (and says so in the environment)."""
    names = os.environ
    if current_launch() is not None or "LOCAL_RANK" in names or ("RANK" in names and "WORLD_SIZE" in names):
        return True
    return "JSM_NAMESPACE_RANK" in names or "OMPI_COMM_WORLD_LOCAL_RANK" in names


def rank(recipe: RecipeBase) -> int:
    """This process's number in the run, before any process group exists."""
    if (launch := current_launch()) is not None:
        return launch.rank
    node, local = int(os.environ.get("NODE_RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    return node * devices_of(recipe) + local


def devices_of(recipe: RecipeBase) -> int:
    """Processes per machine that the recipe asks for."""
    if recipe.trainer.devices != "auto":
        return recipe.trainer.devices
    if recipe.trainer.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def start_others(recipe: RecipeBase, lost: Callable[[str], None]) -> list[subprocess.Popen[bytes]]:
    """Start this machine's other processes with the same command line; nothing where a launcher has done it.

    Args:
        lost: told in words when a process has gone while the others cannot go on; it must end this process.
    Returns:
        the processes, which `wait_for` ends.
    """
    if (parent := os.environ.get(_STARTED_BY)) is not None:
        _watch(lambda: "the first process of this run is gone" if os.getppid() != int(parent) else None, lost)
        return []
    count = devices_of(recipe)
    if started_by_launcher() or count * recipe.trainer.num_nodes == 1:
        return []
    names = os.environ
    names.setdefault("MASTER_ADDR", "127.0.0.1")
    names.setdefault("MASTER_PORT", str(free_port()))
    names.setdefault("NODE_RANK", "0")
    names |= {"WORLD_SIZE": str(count * recipe.trainer.num_nodes), "LOCAL_RANK": "0"}
    _share_cores(count)
    others = [
        subprocess.Popen(_own_command(), env={**names, "LOCAL_RANK": str(number), _STARTED_BY: str(os.getpid())})
        for number in range(1, count)
    ]
    atexit.register(_end, others)
    _watch(lambda: _first_lost(others), lost)
    return others


def wait_for(others: list[subprocess.Popen[bytes]], seconds: float = 60.0) -> None:
    """Wait until the others have ended by themselves; end those that have not by then."""
    until = time.monotonic() + seconds
    for process in others:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
    _end(others)


def forget_world() -> None:
    """Take back what `start_others` put into the environment, for a further run from the same Python process."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def _own_command() -> list[str]:
    """How this process was started: `python -m trainers.fit ...`, or the console script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    name = spec.name.removesuffix(".__main__")
    return [sys.executable, "-m", name, *sys.argv[1:]]


def _share_cores(count: int) -> None:
    """Processes that each take all cores are many times slower than ones that share them."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // count))
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(max(1, cores // count))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_lost(others: list[subprocess.Popen[bytes]]) -> str | None:
    for number, process in enumerate(others, 1):
        if process.poll():
            how = f"by signal {-process.returncode}" if process.returncode < 0 else f"with code {process.returncode}"
            return f"process {number} of this machine ended {how}"
    return None


def _watch(gone: Callable[[], str | None], lost: Callable[[str], None]) -> None:
    """Ask now and then; the collectives usually notice first, and then the process has ended before the grace has."""

    def run() -> None:
        while (reason := gone()) is None:
            time.sleep(_POLL_SECONDS)
        time.sleep(GRACE_SECONDS)
        lost(reason)

    threading.Thread(target=run, daemon=True, name="lost-processes").start()


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    for process in others:
        if process.poll() is None:
            process.kill()
            process.wait()
