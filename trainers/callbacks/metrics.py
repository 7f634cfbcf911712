"""Progress and metrics.  Nothing here waits for the device between two lines of the log."""

from __future__ import annotations

import csv
import io
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass
class Totals:
    """Of one process's part of a run.

    Attributes:
        units: what the updates saw on all ranks, in the task's unit.
        training_s: wall time of the updates and their checkpoints, without paused_s.
        paused_s: drawing samples and writing profiles.
        memory_mib: peak, the largest of all ranks.
    """

    first_step: int = 0
    last_step: int = 0
    units: int = 0
    training_s: float = 0.0
    paused_s: float = 0.0
    memory_mib: float = 0.0


class Metrics(Callback):
    """Loss, throughput, step time, memory and ETA: a bar on a terminal, lines elsewhere, rows for the loggers.

    Sums stay on the device and are fetched every `every` updates; several ranks meet then too: the loss is their mean,
    the memory their largest.  What a task noted itself is the first rank's.

    Attributes:
        totals: of the updates that this process made.
    """

    def __init__(
        self,
        path: Path | None,
        every: int,
        console: Console | None = None,
        log_row: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.path, self.every, self.console, self.log_row = path, every, console or Console(), log_row
        self.file, self.totals = MetricsFile(None), Totals()
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._began, self._shown_at, self._seen_step = 0.0, 0.0, 0
        self._restart(0)

    def _restart(self, step: int) -> None:
        self._since, self._since_step = time.perf_counter(), step
        self._loss: Tensor | float = 0.0
        self._batches, self._paused = 0, 0.0

    def pause(self, seconds: float) -> None:
        """Time that was not training, such as drawing samples."""
        self._paused += seconds
        self.totals.paused_s += seconds

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def say_written(self, path: Path) -> None:
        """A line for a file that was written; a terminal has the bar instead."""
        if not self.console.is_terminal:
            self.say(f"wrote {path} ({size_text(path.stat().st_size)})")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that is resumed."""
        step = trainer.global_step
        self._restart(step)
        self._seen_step, self._began = step, time.perf_counter()
        self.totals = Totals(first_step=step, last_step=step)
        if not trainer.is_global_zero:
            return
        self.file = MetricsFile(self.path, step)
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self._bar_task = self._bar.add_task("", total=trainer.max_steps, completed=step)
            self._bar.start()
        else:
            where = f"{trainer.world_size} x {pl_module.device.type}, {trainer.precision}"
            self.say(f"{'resuming' if step else 'training'} at step {step}/{trainer.max_steps} on {where}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One addition per batch; everything else every `every` updates."""
        # Lightning has divided the loss by the batches of an update.
        self._loss = self._loss + outputs["loss"].detach() * trainer.accumulate_grad_batches
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
        loss, memory_mib = self._over_ranks(trainer, task.device)
        updates = step - self._since_step
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        row["step_s"] = seconds / updates
        if task.order is not None:
            units = task.order.batch_size * task.units_per_sample * trainer.world_size * self._batches
            row[f"{task.unit}_per_s"] = units / seconds
            self.totals.units += units
        row["memory_mib"] = memory_mib
        row |= task.take_notes()
        self.totals.last_step, self.totals.memory_mib = step, memory_mib
        self._restart(step)
        if trainer.is_global_zero:
            self.file.add({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
            if self.log_row is not None:
                self.log_row(row)
            self._show(trainer, row, task.unit)

    def _over_ranks(self, trainer: Trainer, device: torch.device) -> tuple[float, float]:
        """(mean loss since the last row, peak memory in MiB), in one exchange."""
        own = torch.tensor([0.0, memory_bytes(device) / 2**20], device=device)
        own[0] = self._loss / self._batches
        if trainer.world_size > 1:
            own = trainer.strategy.all_gather(own)
        every = own.reshape(-1, 2).tolist()
        return sum(loss for loss, _ in every) / len(every), max(memory for _, memory in every)

    def _show(self, trainer: Trainer, row: Mapping[str, Any], unit: str) -> None:
        rate = f"  {row[name]:.1f} {unit}/s" if (name := f"{unit}_per_s") in row else ""
        text = f"loss {row['loss']:.4g}{rate}  {row['step_s'] * 1000:.0f} ms/step  {row['memory_mib']:.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=row["step"], description=text)
            return
        left = (trainer.max_steps - row["step"]) * row["step_s"]
        self.say(f"step {row['step']}/{trainer.max_steps}  {text}  {clock(left)} left")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """How long it took."""
        self.totals.training_s = time.perf_counter() - self._began - self.totals.paused_s

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


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size_text(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
