"""Throughput of several processes against one: `python -m benchmarks.scaling [recipe=NAME processes=2 ...] [--save]`.

One process and several take turns, each process with one thread on a core of its own and the same batch, through
`python -m trainers.fit`; the throughput is that of metrics.csv after the first line, which holds the first updates'
costs.  Bar: 0.9 of ideal (1.8x for two).
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from trainers import recipes
from trainers.settings import ConfigError

BAR = 0.9
SHORT = {
    "trainer.max_steps": "30",
    "trainer.log_every": "6",
    "trainer.save_every": "1000",
    "trainer.sample_every": "0",
    "data.trajectories": "64",
    "evaluate": "false",
}


def throughput(recipe: str, overrides: dict[str, str], processes: int) -> float:
    """Images per second of all processes together, the median of the lines after the first."""
    with tempfile.TemporaryDirectory() as folder:
        settings = overrides | {"trainer.devices": str(processes), "output_dir": folder, "run": "timed"}
        if processes == 1:
            settings["trainer.strategy"] = "auto"  # nobody to talk to
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "trainers.fit", f"recipe={recipe}", *words]
        # A process without peers would otherwise take every core, which is not what is compared.
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        with next(Path(folder).glob("*/timed/metrics.csv")).open(newline="") as file:
            rows = list(csv.DictReader(file))
    return statistics.median(float(row["images_per_s"]) for row in rows[1:])


def main() -> int:
    """Measure, print, keep; returns 1 below the bar, 2 for a refused recipe."""
    line = recipes.read_command_line(sys.argv[1:], ["--save"])
    processes, rounds = int(line.take("processes") or 2), int(line.take("rounds") or 5)
    recipe = line.take("recipe") or "ilf_dit"
    overrides = {**SHORT, "trainer.accelerator": "cpu", "trainer.strategy": "ddp", **line.overrides}
    try:
        strategy = recipes.compose_recipe(recipe, overrides).trainer.strategy
    except ConfigError as error:
        return recipes.refused(error)
    if len(os.sched_getaffinity(0)) < processes:
        print(f"error: {processes} processes need as many cores, which this machine has not", file=sys.stderr)
        return 2
    pairs = [(throughput(recipe, overrides, 1), throughput(recipe, overrides, processes)) for _ in range(rounds)]
    ratios = sorted(several / one for one, several in pairs)
    ratio = statistics.median(ratios)
    one, several = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{recipe} with {strategy}: {one:.1f} images/s alone, {several:.1f} with {processes} processes: {ratio:.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {rounds} rounds), bar {BAR * processes:.1f}x"
    )
    row = {"recipe": recipe, "strategy": strategy, "processes": processes, "images_per_s": f"{several:.2f}"}
    row |= {"alone_images_per_s": f"{one:.2f}", "ratio": f"{ratio:.3f}"}
    row |= {"lowest": f"{ratios[0]:.3f}", "highest": f"{ratios[-1]:.3f}"}
    if "--save" in line.options:
        print(f"row added to {results.append('scaling', [row])}")
    return int(ratio < BAR * processes)


if __name__ == "__main__":
    sys.exit(main())
