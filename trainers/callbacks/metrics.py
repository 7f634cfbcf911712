"""Progress and metrics.  Nothing here waits for the device between two lines of the log."""

from __future__ import annotations

import csv
import io
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from trainers.run_folder import atomic_write

_REFRESH_SECONDS = 0.25
_WRITE_SECONDS = 5.0


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


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
