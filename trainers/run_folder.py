"""A run's folder: how it is named, who may write into it, where it came from.  Torch-free until devices are asked for.

Every file is written beside its place and renamed, so a reader (or a run that is killed) meets old or new, never half.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from trainers.config import RecipeBase
from trainers.launch import current_launch
from trainers.recipes import to_yaml
from trainers.settings import ConfigError
from trainers.slurm import Job, current_job

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors", "numpy")
# Set by the first process of a run for the ones Lightning starts beside it, which must not choose a folder again.
ENVIRONMENT_KEY = "AFTERBURNER_RUN_FOLDER"
_CHECKPOINT = re.compile(r"step_(\d+)\.ckpt")


def atomic_write(path: Path, content: bytes | str | Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that a crash at any moment leaves the old file or the whole new one.

    Args:
        content: bytes, text (UTF-8), or a function that writes to the open file it is given.
    Raises:
        OSError: naming `path`, when there is no room, say.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        # torch puts a RuntimeError of its own on top of what the system said.
        said = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(said, OSError) and said.errno is not None:
            raise OSError(said.errno, said.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; only POSIX can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class RunFolder:
    """The places inside `outputs/<recipe>/<run>/`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """What made the run: command line, commit, versions, devices."""
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One line per `trainer.log_every` updates."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Learned part, optimizer and loop state, the newest two."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """What is kept: the exported adapter."""
        return self.path / "adapter"

    @property
    def samples(self) -> Path:
        """Sample grids drawn during training and evaluation."""
        return self.path / "samples"

    @property
    def summary(self) -> Path:
        """Where the run's time went, its speed and sizes; of the latest part when it was resumed."""
        return self.path / "summary.json"

    @property
    def profile(self) -> Path:
        """Traces of the updates that `trainer.profile` asks for."""
        return self.path / "profile"

    @property
    def wandb(self) -> Path:
        """W&B's own files, one folder in it per part of the run."""
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """The W&B run that every part of this run belongs to."""
        return self.path / "wandb_id"

    @classmethod
    def for_recipe(cls, recipe: RecipeBase, rank: int = 0) -> RunFolder:
        """The folder this process writes to: the resumed one, the one its first process chose, or a new one.

        Args:
            rank: of this process in the run; rank 0 makes the folder.
        Raises:
            ConfigError: the name is taken by another run, or the folder cannot be made.
        """
        if recipe.resume:
            return cls(Path(recipe.resume))
        if chosen := os.environ.get(ENVIRONMENT_KEY):
            return cls(Path(chosen))
        home = Path(recipe.output_dir) / recipe.recipe
        launch, job = current_launch(), current_job()
        name = recipe.run or (job and job.id)
        if launch is not None and launch.launcher == "torchrun":
            return cls(Path(launch.agree("afterburner/run_folder", lambda: str(_make(home, name, job)))))
        if rank == 0:
            return cls(_make(home, name, job))
        if name is None:
            raise ConfigError(["run=NAME is missing: processes started by hand cannot agree on the next free number"])
        return cls(home / name)

    def begin(self, recipe: RecipeBase, argv: Sequence[str]) -> None:
        """Store the resolved recipe and where the run comes from; remove what a killed run left half written."""
        for leftover in [*self.path.rglob(".*.tmp"), *self.path.glob("failure.txt")]:
            leftover.unlink(missing_ok=True)
        atomic_write(self.config, to_yaml(recipe.model_copy(update={"resume": None})))
        record = provenance(argv) | {"resumed": []}
        if self.provenance.is_file():
            first = json.loads(self.provenance.read_text(encoding="utf-8"))
            record = first | {"resumed": [*first["resumed"], record]}
        atomic_write(self.provenance, json.dumps(record, indent=2) + "\n")

    def discard_if_empty(self) -> None:
        """Remove a folder in which nothing was trained yet, for a run that could not begin."""
        if not any(path.exists() for path in (self.checkpoints, self.metrics, self.wandb_id)):
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # another run lives there
                self.path.parent.rmdir()

    def saved_checkpoints(self) -> list[Path]:
        """The complete checkpoints, newest first."""
        found = [
            (int(match[1]), path)
            for path in self.checkpoints.glob("*.ckpt")
            if (match := _CHECKPOINT.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found, reverse=True)]

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        return next(iter(self.saved_checkpoints()), None)


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` updates."""
    return f"step_{step:07d}.ckpt"


def _make(home: Path, name: str | None, job: Job | None) -> Path:
    """Make and return a run's folder; one that is there is taken only by the job that made it before its requeue."""
    if name is None:
        return _first_free(home)
    folder = home / name
    try:
        folder.mkdir(parents=True, exist_ok=job is not None and job.restarts > 0)
    except FileExistsError:
        # A run that was killed before it had stored its recipe cannot be resumed, only begun again.
        if all(path.name.startswith(".") for path in folder.iterdir()):
            return folder
        raise ConfigError(
            [f"{folder} is another run: continue it with resume={folder}, or choose another name with run=NAME"]
        ) from None
    except OSError as error:
        raise ConfigError([f"{folder} cannot be made ({error.strerror}): choose output_dir=FOLDER"]) from None
    return folder


def _first_free(home: Path) -> Path:
    """Make and return `000`, `001`, ... : mkdir succeeds for one process only, however many ask at once."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in home.iterdir() if path.name.isdigit() and len(path.name) == 3]
        number = max(taken, default=-1) + 1
        while True:
            folder = home / f"{number:03d}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError([f"{home} cannot be made ({error.strerror}): choose output_dir=FOLDER"]) from None


def code_version() -> dict[str, Any]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it} of the code that runs."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Inside someone else's repository (an installed wheel in a project's environment) the commit would be theirs.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """Command line, commit and dirty flag, versions, devices."""
    return {
        "argv": list(argv),
        "python": sys.executable,
        **code_version(),
        "versions": versions(),
        "devices": devices(),
    }


def devices() -> dict[str, Any]:
    """The machine: processor, usable cores, GPUs by name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": cores, "threads": torch.get_num_threads(), "gpus": gpus}
