"""What a run cost and where it left things: the lines at its end, and summary.json.  Torch-free to import."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainers.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from trainers.base import FrozenBackboneTask
    from trainers.callbacks.metrics import Totals

_TOLD = {
    "start_up": "start-up and recording",
    "training": "training",
    "samples": "samples",
    "export": "export",
    "evaluation": "evaluation",
}


class Stopwatch:
    """Wall time, part by part, without gaps.

    Attributes:
        parts: seconds by name, in the order they were measured.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """All time since the last lap was `part`."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now

    def move(self, source: str, **parts: float) -> None:
        """Of what was counted as `source`, these seconds were something else."""
        self.parts[source] -= sum(parts.values())
        self.parts |= parts


def build_summary(
    task: FrozenBackboneTask, totals: Totals, seconds: Mapping[str, float], processes: int, folder: RunFolder
) -> dict[str, Any]:
    """The content of summary.json: of this part of the run only, when it was resumed.

    Args:
        seconds: wall time by part.
        processes: ranks that trained.
    """
    checkpoint, trained = folder.latest_checkpoint(), max(totals.training_s, 1e-9)
    return {
        "recipe": task.recipe.recipe,
        "method": task.recipe.method,
        "device": task.device.type,
        "processes": processes,
        "resumed_at": totals.first_step,
        "steps": totals.last_step,
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "steps_per_s": (totals.last_step - totals.first_step) / trained,
        f"{task.unit}_per_s": totals.units / trained,
        "memory_mib": totals.memory_mib,
        "checkpoint_bytes": checkpoint.stat().st_size if checkpoint else 0,
        "adapter_bytes": sum(path.stat().st_size for path in folder.adapter.rglob("*") if path.is_file()),
    }


def print_summary(summary: Mapping[str, Any], folder: RunFolder, console: Console) -> None:
    """The summary in four lines, and what the folder holds."""
    from trainers.callbacks.metrics import clock, size_text

    seconds = summary["seconds"]
    parts = ", ".join(f"{told} {clock(seconds[part])}" for part, told in _TOLD.items() if part in seconds)
    rates = [
        f"{value:.4g} {name.removesuffix('_per_s')}/s" for name, value in summary.items() if name.endswith("_per_s")
    ]
    sizes = f"checkpoint {size_text(summary['checkpoint_bytes'])}, adapter {size_text(summary['adapter_bytes'])}"
    held = sorted(path.name + "/" * path.is_dir() for path in folder.path.iterdir() if not path.name.startswith("."))
    for line in (
        f"time    {clock(sum(seconds.values()))} in all: {parts}",
        f"speed   {', '.join(rates)}, peak memory {summary['memory_mib']:.0f} MiB",
        f"sizes   {sizes}",
        f"folder  {folder.path}: {', '.join(held)}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
