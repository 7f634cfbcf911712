"""A few updates under torch.profiler, for `trainer.profile`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from trainers.callbacks.metrics import Metrics
from trainers.run_folder import atomic_write

_WARM_UP = 5
_OPERATIONS = 12


class Profile(Callback):
    """A Chrome trace per rank and, on the first rank, a table of the operations that took longest.

    The update before the first is recorded and thrown away, for starting the profiler distorts it.
    """

    def __init__(self, folder: Path, updates: int | tuple[int, int], metrics: Metrics) -> None:
        """
        Args:
            updates: the first and the last (a run's first update is 1), or how many after a warm-up.
            metrics: told of the time that writing takes, and says where the trace is.
        """
        self.folder, self.updates, self.metrics = folder, updates, metrics
        self._first = self._last = self._seen = 0
        self._profiler: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the updates; of a range that was partly done before a resume, the rest."""
        self._seen = trainer.global_step
        if isinstance(self.updates, tuple):
            self._first, self._last = self.updates
        else:  # a run too short to warm up is recorded at its end
            self._first = min(self._seen + _WARM_UP + 1, trainer.max_steps - self.updates + 1)
            self._last = self._first + self.updates - 1
        self._first, self._last = max(self._first, self._seen + 1), min(self._last, trainer.max_steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start with the update before the first, if there is one."""
        update = trainer.global_step + 1
        if self._profiler is not None or not self._first - 1 <= update <= self._last:
            return
        started = time.perf_counter()
        discarded = 1 if update < self._first else 0
        cuda = [ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=0, warmup=discarded, active=self._last - update + 1 - discarded),
        )
        self._profiler.start()
        self.metrics.pause(time.perf_counter() - started)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count updates, not batches; write after the last one."""
        if trainer.global_step == self._seen:  # more batches of this update are to come
            return
        self._seen = trainer.global_step
        if self._profiler is None:
            return
        if self._seen >= self._last:
            started = time.perf_counter()
            self._write(self._profiler, trainer, pl_module.device.type)
            self._profiler = None
            self.metrics.pause(time.perf_counter() - started)
        else:
            self._profiler.step()

    def _write(self, profiler: profile, trainer: Trainer, device: str) -> None:
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_rank{trainer.global_rank}.json.gz"
        hidden = trace.with_name(f".{os.getpid()}.{trace.name}")  # keeps the suffix, by which torch compresses
        profiler.export_chrome_trace(str(hidden))
        os.replace(hidden, trace)
        if trainer.is_global_zero:
            table = operations(profiler, device)
            atomic_write(self.folder / "operations.txt", table)
            updates = f"update {self._last}" if self._first == self._last else f"updates {self._first} to {self._last}"
            self.metrics.say(f"profile of {updates}: {trace} (for ui.perfetto.dev)\n{table}".rstrip())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The profiler does not outlive the run."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def operations(profiler: profile, device: str) -> str:
    """The operations that took longest by themselves, as a table: on the GPU when there is one, else on the CPU."""
    averages = profiler.key_averages()
    steps = sum(event.cpu_time_total for event in averages if event.key.startswith("ProfilerStep"))
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event: getattr(event, name) for event in averages if not event.is_user_annotation}
    total = sum(spent.values()) or 1.0
    lines = [
        f"{total / 1000:.1f} of {steps / 1000:.1f} ms were spent in operations on the {device}",
        f"{'self ms':>10}  {'share':>6}  {'calls':>7}  operation",
    ]
    for event in sorted(spent, key=spent.__getitem__, reverse=True)[:_OPERATIONS]:
        lines.append(f"{spent[event] / 1000:10.2f}  {spent[event] / total:6.1%}  {event.count:7}  {event.key[:80]}")
    return "\n".join(lines) + "\n"
