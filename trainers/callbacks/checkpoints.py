"""Checkpoints: when they are written, that they are whole, and that reading one executes nothing."""

from __future__ import annotations

import pickle
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from trainers import signals
from trainers.run_folder import RunFolder, atomic_write, checkpoint_name
from trainers.slurm import Requeue, requeue

_KEPT = 2
# Ranks ask each other whether to stop about this often, and at the latest after this many updates.
_ASK_SECONDS, _MOST_UPDATES = 1.0, 100


class Interrupted(Exception):  # noqa: N818  (the name says what happened)
    """A signal ended the run: after a step and its checkpoint, or while no step was running (`step` is None).

    `requeue` is what SLURM answered when it was asked to queue the job again.
    """

    def __init__(self, signum: int, step: int | None = None, requeue: Requeue | None = None) -> None:
        when = "while no step was running" if step is None else f"after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}")
        self.signum, self.step, self.requeue = signum, step, requeue


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
        # torch.load does not look at the checksums that torch.save wrote: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return checkpoint
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint that can be read ({reason}): use an older one") from None


def newest_sound(folder: RunFolder, first: bool) -> Path | None:
    """The newest checkpoint that can be read, or None when there are none; a damaged one is told and set aside.

    Args:
        first: this is the run's first process, which does the telling and the renaming.
    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: list[Path] = []
    for path in folder.saved_checkpoints():
        try:
            read_checkpoint(path)
        except FileNotFoundError:  # the first process was quicker
            continue
        except ValueError as error:
            last = error
            damaged.append(path)
            continue
        if first:
            for broken in damaged:
                broken.rename(broken.with_name(f"{broken.name}.damaged"))
                print(
                    f"warning: {broken} is damaged and now has the ending .damaged; going on from {path}",
                    file=sys.stderr,
                )
        return path
    if damaged:
        raise ValueError(f"none of the {len(damaged)} checkpoints can be read, start a new run ({last})")
    return None


class Checkpoints(Checkpoint):
    """The newest two checkpoints, every `every` updates, at the last one, and when a signal asks to stop.

    Not Lightning's ModelCheckpoint: that has no rule for the last step or for a signal but through private methods.
    On SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 to any rank, all of them finish the same step, write a checkpoint, let SLURM
    queue the job again where the signal means that, and raise `Interrupted`; a second SIGINT interrupts at once.
    """

    def __init__(self, folder: Path, every: int, written: Callable[[Path], None] | None = None) -> None:
        self.folder, self.every, self.written = folder, every, written
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._seen_step = 0
        self._asked, self._asked_step, self._ask_step = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the run resumes from is saved already; Lightning has set its own handlers, ours stand in for them."""
        self._seen_step = self._asked_step = trainer.global_step
        self._asked, self._ask_step = time.monotonic(), trainer.global_step + 1
        try:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._note)} | signals.handle(self._note)
        except ValueError:
            self._before = {}  # Only the main thread may set handlers; without them a signal ends the run as usual.
        self.received = signals.take_noted()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            self.received = None  # acted upon
            raise KeyboardInterrupt
        if self.received != signal.SIGTERM:  # a warning does not take back that the job is ending
            self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, between two updates only."""
        step = trainer.global_step
        if step == self._seen_step:  # more batches of this update are to come
            return
        self._seen_step = step
        stop = self._agreed_signal(trainer, step)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            path = self.folder / checkpoint_name(step)
            trainer.save_checkpoint(path)
            self._remove_old(trainer)
            if self.written is not None and trainer.is_global_zero:
                self.written(path)
        if stop:
            self.received = None  # acted upon
            # Every rank is still here: one that left earlier with an error would fail the job before it is queued.
            asked = requeue(stop) if trainer.is_global_zero else None
            raise Interrupted(stop, step, trainer.strategy.broadcast(asked))

    def _agreed_signal(self, trainer: Trainer, step: int) -> int | None:
        """The signal that any rank received.  All ranks get the same answer at the same step; alone nobody is asked.

        The ranks ask each other about once a second, by a count of updates that follows from the slowest rank's time
        for the last ones, and at the last update: a run of a few steps stops on all ranks or on none.
        """
        if trainer.world_size == 1:
            return self.received
        if step < self._ask_step and step != trainer.max_steps:
            return None
        now = time.monotonic()
        pace = (now - self._asked) / (step - self._asked_step)
        own = torch.tensor([float(self.received or 0), pace], device=trainer.strategy.root_device)
        signum, slowest = cast(Tensor, trainer.strategy.reduce(own, reduce_op="max")).tolist()
        self._asked, self._asked_step = now, step
        self._ask_step = step + max(1, min(_MOST_UPDATES, int(_ASK_SECONDS / max(slowest, 1e-6))))
        return int(signum) or None

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
        signals.restore(self._before)
        self._before = {}
        if self.received is not None:  # it came after the last step: whoever runs next shall know
            signals.note(self.received)
