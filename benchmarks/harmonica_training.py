"""What training HarmoniCa's router costs, beside Learning-to-Cache and over the number of sampler steps.

    python -m benchmarks.harmonica_training memory    peak memory of training at 10, 20 and 50 sampler steps
    python -m benchmarks.harmonica_training curve     error of the images over the time that training took
    python -m benchmarks.harmonica_training tables    error of tables that compute half and were not learned

`memory` trains two trajectories of `harmonica_dit` per point, in a process of its own.  `curve` trains each recipe to
its end at each share of computed units, and pauses the clocks while the exported cache draws held-out images.  What
was prepared before the first update (Learning-to-Cache draws its samples) is a column of its own; processor time is
beside the clock's, since it does not depend on what else a machine does.  Keys of the recipes follow as key=value.
`tables` tells what a router can win: units that are computed in the same steps, and units that each go their own way.
All print their rows, and with --save append them to benchmarks/results/harmonica_training_*.csv.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import results
from trainers.recipes import compose_recipe, read_command_line

MEMORY_STEPS = (10, 20, 50)
JUDGED = 64


def quietly(task: Any) -> None:
    """Trains as the command does, and keeps nothing."""
    from trainers.run_folder import RunFolder
    from trainers.training import train

    with tempfile.TemporaryDirectory() as folder:
        train(task, RunFolder(Path(folder)), Console(file=io.StringIO()))


def memory(args: argparse.Namespace) -> None:
    """One row per number of steps, each measured by a fresh process."""
    rows = []
    for steps in MEMORY_STEPS:
        command = [sys.executable, "-m", "benchmarks.harmonica_training", "point", f"--steps={steps}", *args.overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = map(float, done.stdout.split()[-2:])
        rows.append({"steps": steps, "before_mib": before, "peak_mib": peak, "training_mib": round(peak - before, 1)})
        rows[-1]["peak_over_first"] = round(peak / rows[0]["peak_mib"], 4)
    _tell("memory", rows, args.save)


def point(args: argparse.Namespace) -> None:
    """Prints the MiB that were resident before training, and at the worst moment of two trajectories."""
    from trainers.timing import peak_memory
    from trainers.training import build_task

    updates = 2 * (args.steps - 1)
    settings = {"module.steps": str(args.steps), "trainer.max_steps": str(updates), "logger": "none"}
    task = build_task(compose_recipe("harmonica_dit", settings | _overrides(args)))
    device = torch.device("cpu")
    before = peak_memory(lambda: None, device)
    print(round(before / 2**20, 1), round(peak_memory(lambda: quietly(task), device) / 2**20, 1))


class Clocks:
    """Seconds and processor seconds, with pauses."""

    def __init__(self) -> None:
        self.spent = [0.0, 0.0]
        self._since: list[float] | None = None

    @staticmethod
    def _now() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    def go(self) -> None:
        """They run from here on."""
        self._since = self._now()

    def stop(self) -> list[float]:
        """What they show; they stand still until `go`."""
        if self._since is not None:
            self.spent = [a + b - c for a, b, c in zip(self.spent, self._now(), self._since, strict=True)]
            self._since = None
        return self.spent


def judged_by(task: Any) -> tuple[list[Any], list[int], torch.Tensor]:
    """Held-out inputs, seeds of their noise, and the full run's images."""
    from data.inputs import held_out_inputs
    from data.stepped import derive_seed

    inputs = held_out_inputs(task.recipe.backbone.name, task.recipe.data.prompts, 0, JUDGED)
    seeds = [derive_seed(0, "judged", i) for i in range(JUDGED)]
    call = {"num_inference_steps": len(task.config.timesteps), "guidance_scale": task.config.guidance}
    with task.without_hooks():
        return inputs, seeds, task.running.generate(inputs, seeds, **call)


def judge_of(task: Any) -> tuple[Callable[[], tuple[float, float]], float]:
    """What gives the mean squared error of held-out images to the full run's, and the share that is computed.

    Beside it: the error of holding every second step.
    """
    from modules.diffusion_host import attach_reuse
    from modules.reuse import EveryN, Hold
    from trainers.image_quality import mse

    inputs, seeds, full = judged_by(task)
    call = {"num_inference_steps": len(task.config.timesteps), "guidance_scale": task.config.guidance}
    with task.without_hooks(), attach_reuse(task.running.pipe, EveryN(2), Hold(), task.config.granularity):
        held = mse(task.running.generate(inputs, seeds, **call), full)

    def judge() -> tuple[float, float]:
        with task.without_hooks(), task.attach_exported() as handle:
            return mse(task.running.generate(inputs, seeds, **handle.call_kwargs), full), handle.shares[0]

    return judge, held


def trained(name: str, overrides: dict[str, str], points: int) -> list[dict[str, Any]]:
    """Trains a recipe; one row per point of its training."""
    from trainers.training import build_task

    clocks, rows = Clocks(), list[dict[str, Any]]()
    recipe = compose_recipe(name, {"logger": "none", "module.compute": "[]"} | overrides)
    clocks.go()
    task = build_task(recipe)
    prepared = clocks.stop()[0]
    (judge, held), clocks, every = judge_of(task), Clocks(), recipe.trainer.max_steps // points
    task.on_train_start, started = lambda: (started(), clocks.go()), task.on_train_start
    task.on_train_batch_end, ended = lambda *a: (ended(*a), look()), task.on_train_batch_end

    def look() -> None:
        if task.steps_done % every and task.steps_done != recipe.trainer.max_steps:
            return
        seconds, processor = clocks.stop()
        error, share = judge()
        rows.append(
            {"recipe": name, "seed": recipe.seed, "asked": recipe.objective.target_compute, "compute": round(share, 4),
             "updates": task.steps_done, "prepared_s": round(prepared, 1), "training_s": round(seconds, 1),
             "processor_s": round(processor, 1), "mse": f"{error:.3e}",
             "hold_every_2": f"{held:.3e}", "by_threshold": round(float(task.learned.router.mask().float().mean()), 4)}
        )  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        clocks.go()

    quietly(task)
    return rows


def first_below(rows: list[dict[str, Any]], error: float) -> dict[str, Any] | None:
    """The point from which on a training's error stays at or below another's."""
    found = None
    for row in reversed(rows):
        if float(row["mse"]) > error:
            break
        found = row
    return found


def curve(args: argparse.Namespace) -> None:
    """All recipes at all shares; then when the first recipe's error is no higher than where each other one ends."""
    rows = []
    for share in args.compute:
        settings = _overrides(args) | {"objective.target_compute": str(share)}
        first, *others = [trained(name, settings, args.points) for name in args.recipes]
        rows += first + sum(others, [])
        for other in others:
            end, reached = other[-1], first_below(first, float(other[-1]["mse"]))
            print(f"compute {share:g}: {_when(end)} {end['recipe']} ends at {end['mse']}, which {first[0]['recipe']}")
            print("  does not reach" if reached is None else f"  has reached {_when(reached)}")
    if args.save:
        print(results.append("harmonica_training_curve", rows))


LATE = [0, 5, 8, 9, 11, 13, 15, 17, 18, 19]
"""The steps that the forecast's search (docs/methods/forecast.md) found for the embedded DiT at half."""


def tables(args: argparse.Namespace) -> None:
    """One row per table of half of the entries, for 20 steps."""
    from modules.harmonica import attach_masks
    from trainers.image_quality import mse
    from trainers.training import build_task

    rows = []
    for name in args.recipes:
        task = build_task(compose_recipe(name, {"logger": "none"} | _overrides(args)))
        inputs, seeds, full = judged_by(task)
        units, generator = len(task.config.units), torch.Generator().manual_seed(0)
        steps = torch.arange(20)[:, None]
        own_phase = (steps + torch.randint(2, (units,), generator=generator)) % 2 == 0
        random = torch.rand(20, units, generator=generator) < 9 / 19
        found = {
            "every second step": (steps % 2 == 0).expand(20, units),
            "late steps": torch.isin(steps, torch.tensor(LATE)).expand(20, units),
            "every second step, each unit with its own phase": own_phase | (steps == 0),
            "at random": random | (steps == 0),
        }
        for title, mask in found.items():
            with task.without_hooks(), attach_masks(task.running.pipe, task.config, mask[None], None) as handle:
                error = mse(task.running.generate(inputs, seeds, **handle.call_kwargs), full)
            rows.append({"backbone": task.recipe.backbone.name, "table": title})
            rows[-1] |= {"compute": round(float(mask.float().mean()), 4), "mse": f"{error:.3e}"}
    _tell("tables", rows, args.save)


def _when(row: dict[str, Any]) -> str:
    return f"after {row['training_s']} s ({row['processor_s']} s of processor)"


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    return dict(read_command_line(args.overrides, ()).overrides)


def _tell(name: str, rows: list[dict[str, Any]], save: bool) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if save:
        print(results.append(f"harmonica_training_{name}", rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("memory")
    one.set_defaults(run=memory)
    two = commands.add_parser("curve")
    two.add_argument("--recipes", nargs="+", default=["harmonica_dit", "l2c_dit"], help="the first beside the others")
    two.add_argument("--compute", type=float, nargs="+", default=[0.5, 0.65], help="shares of computed units")
    two.add_argument("--points", type=int, default=10, help="how often training is judged")
    two.set_defaults(run=curve)
    three = commands.add_parser("tables")
    three.add_argument("--recipes", nargs="+", default=["harmonica_dit", "harmonica_pixart"])
    three.set_defaults(run=tables)
    four = commands.add_parser("point")
    four.add_argument("--steps", type=int, required=True)
    four.set_defaults(run=point)
    for command in (one, two, three):
        command.add_argument("--save", action="store_true")
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    arguments = parser.parse_args([word for word in sys.argv[1:] if word not in overrides])
    arguments.overrides = overrides
    arguments.run(arguments)
