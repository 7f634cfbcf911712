"""What ended a run, as one sentence and an exit code.  Torch-free: libraries' errors are known by name or wording."""

from __future__ import annotations

import errno
import re
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.settings import ConfigError

FAILED, REFUSED, NOT_FINITE, LOST = 1, 2, 3, 4

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_WORKER_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited)")
_WORKER_RAISED = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")
# What gloo, NCCL and the store between the processes say when one of them is gone.
_SEVERED = re.compile(r"gloo|NCCL|TCPStore|Connection (?:closed|reset|refused) by peer|process ?group", re.IGNORECASE)
_LESS_MEMORY = "lower data.batch_size (trainer.accumulate_grad_batches makes up for it)"


@dataclass(frozen=True)
class Failure:
    """Why a run ended.

    common: all processes of the run end for it, at the same step.
    severed: only that another process of the run no longer answers, which has its own reason.
    unexpected: nothing that a user could have caused; the traceback is worth keeping.
    """

    sentence: str
    code: int = FAILED
    common: bool = False
    severed: bool = False
    unexpected: bool = False


def explain(error: BaseException) -> Failure:
    """The failure that an exception stands for; what it was raised on top of counts too."""
    chain = list(_chain(error))
    for link in chain:
        if (own := _own(link)) is not None:
            return own
    for link in chain:
        if isinstance(link, ValueError):  # a sentence of ours, made of what lies under it
            break
        if isinstance(link, OSError) and link.errno in _FULL:
            return Failure(f"{_FULL[link.errno]}: {link.filename or 'a file'} could not be written; make room there")
    return _known(error) or Failure(_at_its_place(error), unexpected=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _own(error: BaseException) -> Failure | None:
    """Ends that training itself chose, whatever else went wrong on the way out."""
    name = type(error).__name__
    if name == "NonFiniteLoss":
        return Failure(str(error), NOT_FINITE, common=True)
    if name == "Interrupted":
        return Failure(str(error), 128 + error.signum, common=True)  # type: ignore[attr-defined]
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", 128 + signal.SIGINT, common=True)
    if isinstance(error, ConfigError):
        return Failure("; ".join(error.problems), REFUSED)
    return None


def _known(error: BaseException) -> Failure | None:
    text, names = _one_line(error), {kind.__name__ for kind in type(error).__mro__}
    if raised := _WORKER_RAISED.search(text):
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        message = last.removeprefix(f"{raised[1]}: ")
        return Failure(f"a data-loading process failed: {message if isinstance(error, ValueError | OSError) else last}")
    if ended := _WORKER_ENDED.search(text):
        how = f"was ended by the signal {ended[2]}" if ended[2] else "ended without a word"
        return Failure(
            f"a data-loading process (pid {ended[1]}) {how}, as when memory runs out: lower trainer.num_workers"
        )
    if "OutOfMemoryError" in names:
        return Failure(f"the GPU's memory is full ({text.partition('. GPU')[0]}): {_LESS_MEMORY}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return Failure(f"memory ran out{f' ({text[:160]})' if text else ''}: {_LESS_MEMORY}")
    if "DistError" in names or (isinstance(error, RuntimeError) and _SEVERED.search(text)):
        return Failure(f"the processes of this run lost one another ({text[:200]})", LOST, severed=True)
    if isinstance(error, OSError):
        return Failure(_of_system(error) or text)
    if isinstance(error, ValueError) or names & {"MisconfigurationException", "SafetensorError", "BadZipFile"}:
        return Failure(text)
    return None


def _of_system(error: OSError) -> str | None:
    if not error.filename or error.errno is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.filename} may not be opened by this user (permission denied)"
    if error.errno == errno.EROFS:
        return f"{error.filename} cannot be written: its file system is read-only"
    return f"{error.filename}: {error.strerror}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _at_its_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {_one_line(error)[:300] or 'no message'}"
