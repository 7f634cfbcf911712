"""What spacing and fitted rows bring without a loop: `python -m benchmarks.ilf_solvers recipe=NAME [--save]`.

PSNR to the 50-step images of 64 held-out inputs for DPM-Solver++(2M) and for rows fitted on 256 recorded trajectories,
at even spacing and at the recipe's own timesteps.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import results
from data.inputs import held_out_inputs, training_inputs
from data.trajectories import Trajectories, record_trajectories
from modules.pipelines import DiffusionDriver, driver, load_pipeline
from modules.solvers import SolverTable
from trainers import recipes
from trainers.ilf import schedule
from trainers.image_quality import psnr_db
from trainers.settings import ConfigError

FITTED, JUDGED = 256, 64


def judge(running: DiffusionDriver, table: SolverTable, runs: Trajectories, guidance: float) -> float:
    """Mean PSNR in dB of a solver's images to the runs' own last ones."""
    final = schedule.run_solver(running, table, runs, guidance)
    return psnr_db(running.decode(final), running.decode(runs.at(len(runs.timesteps))))


def main() -> int:
    """Print one line a solver."""
    try:
        line = recipes.read_command_line([word for word in sys.argv[1:] if word != "--save"], ())
        recipe: Any = recipes.compose_recipe(line.take("recipe") or "ilf_pixart", line.overrides)
    except ConfigError as error:
        return recipes.refused(error)
    name, guidance, reference = recipe.backbone.name, recipe.module.guidance, recipe.objective.reference_steps
    running = driver(load_pipeline(name), name)
    shared: dict[str, Any] = {"steps": reference, "guidance": guidance}
    fitted = record_trajectories(running, training_inputs(name, None, 0, FITTED), range(FITTED), **shared)
    seeds = range(1_000_000, 1_000_000 + JUDGED)
    judged = record_trajectories(running, held_out_inputs(name, None, 0, JUDGED), seeds, **shared)
    own = schedule.nearest_positions(recipe.module.timesteps, fitted.timesteps)
    steps = len(own)
    spacings = {
        f"{steps} steps, even": schedule.even_positions(steps, reference),
        f"{steps + 2} steps, even": schedule.even_positions(steps + 2, reference),
        f"{steps} steps, the recipe's": own,
    }
    rows = []
    for spacing, positions in spacings.items():
        plain = schedule.initial_table(running, [fitted.timesteps[p] for p in positions])
        rows_fitted = schedule.fit_solver(running, fitted, positions, guidance)
        for solver, table in (("DPM-Solver++(2M)", plain), ("fitted rows", rows_fitted)):
            rows.append({"backbone": name, "solver": solver, "spacing": spacing})
            rows[-1]["psnr_db"] = f"{judge(running, table, judged, guidance):.2f}"
            print(f"{solver:18} {spacing:24} {rows[-1]['psnr_db']} dB", flush=True)
    if "--save" in sys.argv:
        print(results.append("ilf_solvers", rows))
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
