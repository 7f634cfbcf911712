"""What happens around the steps: progress and metrics, sample grids, checkpoints.  Nothing here waits for the device
between two lines of the log."""

from __future__ import annotations

import csv
import io
import pickle
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from trainers.base import FrozenBackboneTask
from trainers.plots import save_grid
from trainers.run_folder import RunFolder, atomic_write, checkpoint_name

_KEPT = 2
_REFRESH_SECONDS = 0.25
_WRITE_SECONDS = 5.0


class Interrupted(Exception):  # noqa: N818  (the name says what happened)
    """A signal ended the run between two steps, after a checkpoint."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints appear whole or not at all, and loading one executes nothing.

    Lightning's own writes to the system's temporary folder first, from where a move may be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside `path`, flush to disk, rename."""
        atomic_write(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever the caller asks for."""
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one file."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's contents without executing anything from it.

    Raises:
        ValueError: damaged, or it holds other than tensors and plain values.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that can be read ({reason}): use an older one") from None


class Checkpoints(Checkpoint):
    """The newest two checkpoints, every `every` updates, at the last one, and when a signal asks to stop.

    Not Lightning's ModelCheckpoint: that has no rule for the last step or for a signal but through private methods.
    On SIGINT or SIGTERM the running step is finished, a checkpoint written and `Interrupted` raised; a second SIGINT
    interrupts at once.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._seen_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the run resumes from is saved already; Lightning has set its own handlers, ours stand in for them."""
        self._seen_step = trainer.global_step
        try:
            self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self._before = {}  # Only the main thread may set handlers; without them a signal ends the run as usual.

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, between two updates only."""
        step = trainer.global_step
        if step == self._seen_step:  # more batches of this update are to come
            return
        self._seen_step = step
        stop = self._agreed_to_stop(trainer, step)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / checkpoint_name(step))
            self._remove_old(trainer)
        if stop:
            raise Interrupted(self.received or signal.SIGTERM, step)

    def _agreed_to_stop(self, trainer: Trainer, step: int) -> bool:
        """All ranks must leave at the same step; alone there is nobody to ask."""
        if trainer.world_size == 1:
            return self.received is not None
        return step % 10 == 0 and trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def _remove_old(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step_*.ckpt"))[:-_KEPT]:
                old.unlink(missing_ok=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Signals mean what they meant before."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning does not call teardown then."""
        self._give_back()

    def _give_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


class MetricsFile:
    """metrics.csv: one row per call, columns as they come; a resumed run drops the rows it will make again."""

    def __init__(self, path: Path | None, resumed_at: int = 0) -> None:
        self.path, self.rows = path, []
        self._written = 0.0
        if path is not None and path.is_file():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed_at]

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row; the file is written anew at most every few seconds."""
        self.rows.append(dict(row))
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring the file up to date."""
        if self.path is None or not self.rows:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.path, text.getvalue())
        self._written = time.monotonic()


class Metrics(Callback):
    """Loss, images/s, step time, memory and ETA: a bar on a terminal, lines elsewhere, rows in metrics.csv.

    Sums stay on the device and are fetched every `every` updates.
    """

    def __init__(self, path: Path | None, every: int, console: Console | None = None) -> None:
        self.path, self.every, self.console = path, every, console or Console()
        self.file = MetricsFile(None)
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._shown_at, self._seen_step = 0.0, 0
        self._restart(0)

    def _restart(self, step: int) -> None:
        self._since, self._since_step = time.perf_counter(), step
        self._loss: Tensor | float = 0.0
        self._batches, self._paused = 0, 0.0

    def pause(self, seconds: float) -> None:
        """Time that was not training, such as drawing samples."""
        self._paused += seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that is resumed."""
        self._restart(trainer.global_step)
        self._seen_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        self.file = MetricsFile(self.path, trainer.global_step)
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self._bar_task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One addition per batch; everything else every `every` updates."""
        self._loss = self._loss + outputs["loss"].detach()
        self._batches += 1
        step = trainer.global_step
        if step == self._seen_step:  # more batches of this update are to come
            return
        self._seen_step = step
        now = time.monotonic()
        if self._bar is not None and now - self._shown_at > _REFRESH_SECONDS:
            self._shown_at = now
            self._bar.update(self._bar_task, completed=step)
        if step % self.every == 0 or step == trainer.max_steps:
            self._report(trainer, pl_module, step)

    def _report(self, trainer: Trainer, task: Any, step: int) -> None:
        # Reading the loss waits for the device, so the clock is read after it.
        loss = float(self._loss) / self._batches
        updates = step - self._since_step
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        row["step_s"] = seconds / updates
        if task.order is not None:
            row["images_per_s"] = task.order.batch_size * trainer.world_size * self._batches / seconds
        row["memory_mib"] = memory_bytes(task.device) / 2**20
        row |= task.take_notes()
        self._restart(step)
        if trainer.is_global_zero:
            self.file.add({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
            self._show(trainer, row)

    def _show(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        rate = f"  {row['images_per_s']:.1f} img/s" if "images_per_s" in row else ""
        text = f"loss {row['loss']:.4g}{rate}  {row['step_s'] * 1000:.0f} ms/step  {row['memory_mib']:.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=row["step"], description=text)
            return
        left = int((trainer.max_steps - row["step"]) * row["step_s"])
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        print(f"step {row['step']}/{trainer.max_steps}  {text}  {clock} left", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what is left."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning does not call teardown then."""
        self._close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that resumes from this checkpoint needs the rows up to it."""
        self.file.flush()

    def _close(self) -> None:
        self.file.flush()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class SampleGrids(Callback):
    """Every `every` updates a picture: the teacher's images above the student's, same noise."""

    def __init__(self, folder: Path, every: int, metrics: Metrics, count: int = 8) -> None:
        self.folder, self.every, self.metrics, self.count = folder, every, metrics, count
        self._drawn = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw on the first rank; the next batch seeds its own random numbers, so training does not notice."""
        step = trainer.global_step
        if step == self._drawn or step == 0 or step % self.every or not trainer.is_global_zero:
            return
        self._drawn = step
        assert isinstance(pl_module, FrozenBackboneTask)
        started = time.perf_counter()
        pl_module.eval()
        try:
            with torch.no_grad():
                images = pl_module.sample_images(self.count)
        finally:
            pl_module.train()
        if images is not None:
            save_grid(self.folder / f"step_{step:07d}.png", images, ["backbone", pl_module.recipe.method])
        self.metrics.pause(time.perf_counter() - started)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_parameter_table(task: FrozenBackboneTask, console: Console) -> None:
    """What is trained, what of it started as a copy, what is frozen."""
    table = Table(box=None, header_style="bold")
    for heading in ("part", "state", "parameters", "dtype"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for row in task.parameter_table():
        state = f"trained, copied from {row['copied_from']}" if "copied_from" in row else row["state"]
        table.add_row(row["part"], state, f"{row['parameters']:,}", row["dtype"])
    console.print(table)


def callbacks_for(task: FrozenBackboneTask, folder: RunFolder, console: Console | None = None) -> list[Callback]:
    """The callbacks of one run, as its recipe asks for them."""
    settings = task.recipe.trainer
    metrics = Metrics(folder.metrics if task.recipe.logger == "csv" else None, settings.log_every, console)
    found: list[Callback] = [metrics, Checkpoints(folder.checkpoints, settings.save_every)]
    if settings.sample_every:
        found.append(SampleGrids(folder.samples, settings.sample_every, metrics))
    return found
