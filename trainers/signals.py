"""Signals that ask a run to stop: noted from its first line on, acted upon where that is safe.

SLURM may send its warning up to a minute early, while imports run; the default action would end the process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]
# SIGUSR1 and SIGUSR2 are what clusters send before they take a node back; Windows has neither.
ASKING = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
_noted: set[int] = set()


def note(signum: int, frame: FrameType | None = None) -> None:
    """A handler that remembers and does nothing else."""
    _noted.add(signum)


def handle(handler: Handler = note) -> dict[int, Any]:
    """Give every asking signal this handler; returns what they had, for `restore`."""
    return {signum: signal.signal(signum, handler) for signum in ASKING}


def restore(before: dict[int, Any]) -> None:
    """Signals mean what they meant before `handle`."""
    for signum, handler in before.items():
        signal.signal(signum, handler)


def take_noted() -> int | None:
    """The gravest signal noted since the last call, or None: SIGTERM is more than the two warnings."""
    found = max(_noted, key=lambda signum: (signum == signal.SIGTERM, signum), default=None)
    _noted.clear()
    return found
