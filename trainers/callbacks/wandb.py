"""The Weights & Biases run of `logger=wandb`, on the first rank.  W&B is imported only when it is asked for."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from trainers.config import RecipeBase
from trainers.loggers import sign_in
from trainers.run_folder import RunFolder, atomic_write

_INIT_SECONDS, _FINISH_SECONDS = 30, 60
_FLUSH_SECONDS = 1.0  # what a killed run can lose; W&B's own default is 15


class WandbRun(Callback):
    """One W&B run per run folder, whichever process continues it: its id is kept in the folder.

    Once it has begun, W&B cannot stop the training: the first thing it raises is told, and no more.  The run
    outlives `Trainer.fit`, so that the report can be added; `finish` closes it.
    """

    def __init__(self, recipe: RecipeBase, folder: RunFolder, console: Console | None = None) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console or Console()
        self._run: Any = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin, or continue what the folder's id names.

        Raises:
            ConnectionError: W&B must be online and is not, or cannot write.
        """
        if trainer.is_global_zero:
            self._run = self._begin()

    def _begin(self) -> Any:
        mode, reason = self._mode()
        try:
            run = self._init(mode)
        except Exception as error:  # what W&B raises here has no common base: its own errors, pydantic's, OSError
            told = " ".join(str(error).split())
            if mode != "online" or self.recipe.wandb.mode == "online":
                raise ConnectionError(f"W&B did not begin ({told}): set wandb.mode=offline, or logger=csv") from None
            mode, reason = "offline", f"it did not begin online ({told})"
            _tear_down()  # W&B's process still holds the id
            run = self._init(mode)
        if mode == "offline":
            why = f" because {reason}" if reason else ""
            told = f"W&B is offline{why}; send it later with: wandb sync {self.folder.wandb}/offline-run-*"
        else:
            told = f"W&B is {mode}: {run.url}" if run.url else f"W&B is {mode}"
        self.console.print(told, highlight=False, markup=False, soft_wrap=True)
        return run

    def _mode(self) -> tuple[str, str | None]:
        """(W&B's mode, why it is not online)."""
        asked, usual = self.recipe.wandb.mode, os.environ.get("WANDB_MODE", "online")
        if asked == "offline":
            return asked, None
        if asked == "auto" and usual != "online":
            return usual, f"WANDB_MODE is {usual}"
        reason = sign_in()
        if reason and asked == "online":
            raise ConnectionError(f"wandb.mode is online but {reason}: mend that, or set wandb.mode=auto or offline")
        return ("offline" if reason else "online"), reason

    def _init(self, mode: str) -> Any:
        import wandb

        settings = self.recipe.wandb
        own = wandb.Settings(
            silent=True, init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
        )
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:  # experimental, may go again
            own.x_transaction_log_flush_interval = _FLUSH_SECONDS
        run = wandb.init(
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            name=settings.name or f"{self.recipe.recipe}/{self.folder.path.name}",
            tags=settings.tags,
            id=self._id(),
            resume="allow",
            dir=self.folder.path,
            config=self._config(),
            allow_val_change=True,  # a resumed run may have a larger budget
            reinit="create_new",
            settings=own,
        )
        atomic_write(self.folder.wandb_id, f"{run.id}\n")
        # Rows are placed by their own step: W&B's counter begins again in every offline part.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        if self.folder.wandb_id.is_file():
            return self.folder.wandb_id.read_text(encoding="utf-8").strip()
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def _config(self) -> dict[str, Any]:
        stored = self.folder.provenance
        provenance = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        return self.recipe.model_dump(mode="json", exclude={"wandb", "resume"}) | {"provenance": provenance}

    # What is logged.

    def log_row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.csv, under the same names."""
        self._safely(lambda run: run.log(dict(row)))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """A picture file, beside the metrics of that step."""
        import wandb

        self._safely(lambda run: run.log({"step": step, name: wandb.Image(str(path))}))

    def log_results(self, report: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> None:
        """What the end of a run leaves: the report's table and pictures, the adapter as an artifact, the summary."""
        import wandb

        step = summary["steps"]
        if report is not None:
            columns, data = _table(report["rows"])
            self._safely(lambda run: run.log({"step": step, "report": wandb.Table(columns=columns, data=data)}))
            self.log_picture("speed_quality", self.folder.path / "report.png", step)
            self.log_picture("report_samples", self.folder.samples / "grid.png", step)
        self._safely(self._log_adapter)
        self._safely(lambda run: run.summary.update(dict(summary)))

    def _log_adapter(self, run: Any) -> None:
        import wandb

        artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter")
        with _staged_under(self.folder.wandb):
            for path in sorted(path for path in self.folder.adapter.rglob("*") if path.is_file()):
                name = path.relative_to(self.folder.adapter).as_posix()
                artifact.add_file(str(path), name=name, skip_cache=True)
        run.log_artifact(artifact)

    def _safely(self, act: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            gone = isinstance(error, ConnectionError)  # to W&B's own process on this machine, to which all goes
            if not self._warned:
                self._warned = True
                told = " ".join(f"{type(error).__name__}: {error}".split())
                what = "has ended" if gone else "is incomplete"
                kept = f"the run goes on, and what W&B has not received is in {self.folder.wandb} for wandb sync"
                print(f"warning: W&B logging {what} ({told}); {kept}", file=sys.stderr, flush=True)
            if gone:
                self._run = None
                _tear_down()  # else W&B tries once more, with a traceback, when this process ends

    # How it ends.

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run, waiting a minute at most for what is still to be sent."""
        self._safely(lambda run: run.finish(exit_code))
        self._run = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that broke off says so."""
        self.finish(1)

    @contextmanager
    def closing(self) -> Iterator[WandbRun]:
        """Finish on leaving, as failed if by an exception."""
        try:
            yield self
        except BaseException:
            self.finish(1)
            raise
        self.finish()


def _tear_down() -> None:
    """Give W&B's own process up, in whatever state it is."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of a report's rows; what a row lacks is None."""
    work, quality = ([*dict.fromkeys(name for row in rows for name in row[part])] for part in ("work", "quality"))
    plain = ["name", "kind", "speedup", "latency_s", "memory_bytes"]
    columns = [*plain, "speedup_low", "speedup_high", *work, *quality]
    data = [
        [row[name] for name in plain]
        + [*row["speedup_range"]]
        + [row["work"].get(name) for name in work]
        + [row["quality"].get(name) for name in quality]
        for row in rows
    ]
    return columns, data


@contextmanager
def _staged_under(folder: Path) -> Iterator[None]:
    """W&B copies an artifact's files under WANDB_DATA_DIR until they are sent; the home folder is no place for that."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
