"""Trains the tests' tiny ILF under several strategies, one after the other, as one rank of a group.

python -m tests.strategy_worker JOBS.json: a list of {"name", "kind", "from", "overrides"}; each job writes
<root>/<name>/ (checkpoints, metrics.csv, adapter) and each rank <root>/<name>/rank_N.json.  `from` is a job whose
checkpoints are continued.  `start` runs it with several ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start(root: Path, jobs: list[dict[str, Any]], ranks: int = 2, seconds: float = 500.0, device: str = "cpu") -> None:
    """Run the jobs with `ranks` processes; raises with the output where one of them failed."""
    from trainers.processes import free_port

    file = root / "jobs.json"
    file.write_text(json.dumps({"root": str(root), "jobs": jobs}))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    names = {**os.environ, **shared, "NODE_RANK": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device}
    command = [sys.executable, "-m", "tests.strategy_worker", str(file)]
    logs = [root / f"rank_{number}.log" for number in range(ranks)]
    started = []
    for number, log in enumerate(logs):
        with log.open("w") as output:
            environment = {**names, "LOCAL_RANK": str(number)}
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)


def run(root: Path, job: dict[str, Any]) -> None:
    """One job, on every rank."""
    import torch
    from rich.console import Console

    from trainers import recipes, training
    from trainers.run_folder import RunFolder

    file = ROOT / "tests" / f"{job.get('method', 'ilf')}_tiny.yaml"
    recipe = recipes.compose_recipe(str(file), job["overrides"])
    folder = RunFolder(root / job["name"])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if job.get("from") and rank == 0:
        shutil.copytree(root / job["from"] / "checkpoints", folder.checkpoints)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    task = training.build_task(recipe)
    trainer = training.train(task, folder, Console(quiet=True))
    training.export(task, trainer, folder.adapter)
    told = {
        "held": sum(local_bytes(parameter) for parameter in task.backbone.parameters()),
        "whole": sum(full_size(parameter) * parameter.element_size() for parameter in task.backbone.parameters()),
        "dtypes": sorted({str(getattr(p, "ds_tensor", p).dtype) for p in task.backbone.parameters()}),
        "learned_dtypes": sorted({str(parameter.dtype) for parameter in task.learned.parameters()}),
        "gradients": sum(parameter.grad is not None for parameter in task.backbone.parameters()),
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
    }
    (folder.path / f"rank_{rank}.json").write_text(json.dumps(told))


def full_size(parameter: Any) -> int:
    """Elements of a parameter that may be sharded."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_bytes(parameter: Any) -> int:
    """Bytes of a parameter that this rank holds between steps."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3; a small one may be whole as well
        return int((parameter.ds_tensor.numel() + parameter.numel()) * parameter.element_size())
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.numel() * local.element_size())


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[1]).read_text())
    for one in told["jobs"]:
        run(Path(told["root"]), one)
