"""The processes of one run: which of them holds the folder, which is lost, and which one says why the run ended."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from trainers import processes
from trainers.failures import FAILED, LOST, Failure
from trainers.settings import ConfigError

# How long the reason of a process that failed may take to appear; one that was killed leaves none.
REASON_SECONDS = 3.0
TAKE_SECONDS = 1.0


class Seats:
    """`.lock` in a run's folder: process r of the run holds a lock on byte r for as long as it lives.

    The system gives the byte back however the process ends, on every node that shares the folder, so a killed run
    blocks nobody and a missing process has a number.  Where the file system knows no locks, nothing is ever refused.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path, self.number = folder / ".lock", number
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take this process's seat; False while that is impossible.

        Raises:
            ConfigError: the first process's seat is another run's, or the folder cannot be written.
        """
        if self._descriptor is not None:
            return True
        first = self.number == 0
        until = time.monotonic() + TAKE_SECONDS
        while (taken := self._try()) is None and first and time.monotonic() < until:
            time.sleep(0.05)
        if taken is None and first:
            raise ConfigError(
                [f"{self.path.parent} is being written by {self._holder()}: wait until that run ends, or stop it"]
            )
        return bool(taken)

    def _try(self) -> bool | None:
        """True: taken.  False: there are no locks here, or no file yet.  None: somebody else has it."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT if self.number == 0 else 0), 0o666)
        except OSError as error:
            if self.number == 0:
                raise ConfigError(
                    [f"{self.path.parent} cannot be written ({error.strerror}): copy it to a place where it can be"]
                ) from None
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.number)
            if self.number == 0:
                # The run before may have removed the file between our opening and our locking it.
                if not self.path.exists() or os.fstat(descriptor).st_ino != self.path.stat().st_ino:
                    os.close(descriptor)
                    return None
                with suppress(OSError):  # a full disk: the words are only for people
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def _holder(self) -> str:
        with suppress(OSError):
            return self.path.read_text(encoding="utf-8") or "another process"
        return "another process"

    def is_empty(self, number: int) -> bool:
        """Nobody sits there; False when that cannot be told."""
        if self._descriptor is None:
            return False
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, number)
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        except OSError:
            return False
        return True

    def leave(self) -> None:
        """Give the seat back; the first process also clears the file away."""
        if self._descriptor is not None:
            if self.number == 0:
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


class Reason:
    """`failure.txt` in a run's folder: why the run ended, written by whichever process knew first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "failure.txt"

    def claim(self, failure: Failure, trace: str) -> bool:
        """Be the one that tells; False when another process of this start of the run has told already."""
        for _ in range(2):
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(f"{failure.sentence}\nexit code {failure.code}, start {_start()}\n{trace}")
                return True
            except FileExistsError:
                if self.code() is not None:
                    return False
                with suppress(OSError):  # of an earlier start
                    self.path.unlink()
            except OSError:  # no room for the words; the empty file still says that they were told
                return True
        return True

    def code(self) -> int | None:
        """The exit code of this start's failure, or None while there is none."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        if len(lines) < 2:
            return FAILED
        code, _, start = lines[1].removeprefix("exit code ").partition(", start ")
        return int(code) if start == _start() else None


def _start() -> str:
    """What the processes of one start have in common, and no later start has."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


class Crew:
    """This process among those of its run, from before training until it ends.

    Entering `with Crew(...) as crew:` refuses a folder that another run is writing to.

    Attributes:
        others: the processes that this one has started.  failed: whether this process has told, or knows, why it ends.
    """

    def __init__(
        self, folder: Path, number: int, closing: Callable[[], str], discard: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            number: the process's, in the run.
            closing: how the run goes on, for the end of the sentence about why it stopped.
            discard: clears away a run that could not begin; called by the first process after a failure.
        """
        self.number, self.closing, self.discard = number, closing, discard
        self.others: list[subprocess.Popen[bytes]] = []
        self.failed = False
        self._seats, self._reason = Seats(folder, number), Reason(folder)
        self._ended, self._telling = threading.Event(), threading.Lock()

    def __enter__(self) -> Crew:
        self._seats.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.done()
        self._seats.leave()

    def done(self) -> None:
        """Training is over: the others may end when they like."""
        self._ended.set()

    def lost(self, reason: str) -> None:
        """End this process from a thread: its main one waits, inside a library, for one that will never answer."""
        if self._ended.is_set():
            return
        code = self.tell(Failure(reason, LOST, severed=True))
        processes.wait_for(self.others, seconds=0)
        self._seats.leave()
        sys.stdout.flush()
        os._exit(code)

    def tell(self, failure: Failure, trace: str = "") -> int:
        """Say once for the whole run why it ended, in one line on stderr; returns the exit code of that reason.

        Args:
            trace: kept in failure.txt.
        """
        with self._telling:
            self.done()
            self.failed = True
            code = self._told_by_another() if failure.severed else None
            if code is None:
                code = failure.code
                if self._reason.claim(failure := self._worded(failure), trace):
                    print(f"error: {failure.sentence}; {self.closing()}", file=sys.stderr, flush=True)
            if self.number == 0 and not failure.unexpected:
                self.discard()
            return code

    def _worded(self, failure: Failure) -> Failure:
        sentence, size = failure.sentence, self._size()
        if failure.severed:
            sentence = self._who_is_lost() or sentence
        elif size > 1 and not failure.common:
            sentence = f"process {self.number} of {size}: {sentence}"
        if failure.unexpected:
            sentence += f" (traceback: {self._reason.path})"
        return replace(failure, sentence=sentence)

    def _told_by_another(self) -> int | None:
        until = time.monotonic() + REASON_SECONDS
        while (code := self._reason.code()) is None and time.monotonic() < until:
            if self._lost_numbers():  # it would have told before it ended
                return self._reason.code()
            time.sleep(0.05)
        return code

    def _size(self) -> int:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size()
        return max(int(os.environ.get("WORLD_SIZE", "1")), 1 + len(self.others))

    def _lost_numbers(self) -> list[int]:
        dead = {n for n, child in enumerate(self.others, self.number + 1) if child.poll() is not None}
        others = set(range(self._size())) - {self.number}
        return sorted(dead | {number for number in others if self._seats.is_empty(number)})

    def _who_is_lost(self) -> str | None:
        if not (lost := self._lost_numbers()):
            return None
        signals = {
            n: signal.Signals(-child.returncode).name
            for n, child in enumerate(self.others, self.number + 1)
            if (child.poll() or 0) < 0
        }
        by = f"killed by {signals[lost[0]]}" if lost[0] in signals else "killed"
        named = f"process {lost[0]}" if len(lost) == 1 else f"processes {', '.join(map(str, lost))}"
        return f"{named} of {self._size()} ended without a word ({by}, or out of memory)"
