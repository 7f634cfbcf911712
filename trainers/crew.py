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
from types import TracebackType

from trainers.failures import FAILED, LOST, Failure
from trainers.settings import ConfigError

POLL_SECONDS = 0.5
# How long a process has for finding out by itself (its next exchange fails) that another one is gone.
GRACE_SECONDS = 10.0
# How long the reason of a process that failed may take to appear; one that was killed leaves none.
REASON_SECONDS = 3.0
TAKE_SECONDS = 1.0
# Set for the processes that Lightning starts: who started them.
PARENT_KEY = "AFTERBURNER_PARENT"


def rank(devices: int = 1) -> int:
    """This process's number in its run, as whatever launched it says; 0 when nothing did.

    Args:
        devices: processes per node, for Lightning's own launcher, which gives numbers within a node only.
    """
    for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if key in os.environ:
            before = int(os.environ.get("NODE_RANK", "0")) * devices if key == "LOCAL_RANK" else 0
            return before + int(os.environ[key])
    return int(os.environ.get("NODE_RANK", "0")) * devices


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


class Processes:
    """This process among those of its run, from before training until it ends.

    Entering `with Processes(...) as processes:` refuses a folder that another run is writing to.
    """

    def __init__(
        self, folder: Path, number: int, closing: Callable[[], str], discard: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            closing: how the run goes on, for the end of the sentence about why it stopped.
            discard: clears away a run that could not begin; called by the first process after a failure.
        """
        self.number, self.closing, self.discard = number, closing, discard
        self.seats, self.reason = Seats(folder, number), Reason(folder)
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended, self._telling = threading.Event(), threading.Lock()
        self._failed = False
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> Processes:
        self.seats.take()
        self._take_over_observing()
        self._parent = os.environ.get(PARENT_KEY)
        os.environ[PARENT_KEY] = str(os.getpid())
        if self.number > 0:
            self._watch(self._first_is_lost(self._parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()
        self._restore()
        if self._parent is None:
            del os.environ[PARENT_KEY]
        # Those that wait for this process in an exchange would wait for as long as it lives.
        until = time.monotonic() + (1.0 if self._failed or error else GRACE_SECONDS)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
        self._kill_children()
        self.seats.leave()

    def done(self) -> None:
        """Training is over: the others may end when they like."""
        self._ended.set()

    def tell(self, failure: Failure, trace: str = "") -> int:
        """Say once for the whole run why it ended, in one line on stderr; returns the exit code of that reason.

        Args:
            trace: kept in failure.txt.
        """
        with self._telling:
            self.done()
            self._failed = True
            code = self._told_by_another() if failure.severed else None
            if code is None:
                code = failure.code
                if self.reason.claim(failure := self._worded(failure), trace):
                    print(f"error: {failure.sentence}; {self.closing()}", file=sys.stderr, flush=True)
            if self.number == 0 and not failure.unexpected:
                self.discard()
            return code

    def _worded(self, failure: Failure) -> Failure:
        sentence, size = failure.sentence, self._size()
        if failure.severed:
            sentence = self._who_is_lost() or sentence
        elif size > 1:
            sentence = f"process {self.number} of {size}: {sentence}"
        if failure.unexpected:
            sentence += f" (traceback: {self.reason.path})"
        return replace(failure, sentence=sentence)

    def _told_by_another(self) -> int | None:
        until = time.monotonic() + REASON_SECONDS
        while (code := self.reason.code()) is None and time.monotonic() < until:
            if self._lost_numbers():  # it would have told before it ended
                return self.reason.code()
            time.sleep(0.05)
        return code

    def _size(self) -> int:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size()
        return max(int(os.environ.get("WORLD_SIZE", "1")), 1 + len(self._children))

    def _lost_numbers(self) -> list[int]:
        dead = {n for n, child in enumerate(self._children, self.number + 1) if child.poll() is not None}
        others = set(range(self._size())) - {self.number}
        return sorted(dead | {number for number in others if self.seats.is_empty(number)})

    def _who_is_lost(self) -> str | None:
        if not (lost := self._lost_numbers()):
            return None
        signals = {
            n: signal.Signals(-child.returncode).name
            for n, child in enumerate(self._children, self.number + 1)
            if (child.poll() or 0) < 0
        }
        by = f"killed by {signals[lost[0]]}" if lost[0] in signals else "killed"
        named = f"process {lost[0]}" if len(lost) == 1 else f"processes {', '.join(map(str, lost))}"
        return f"{named} of {self._size()} ended without a word ({by}, or out of memory)"

    # Watching, for a main thread that waits inside a library and cannot be told.

    def _take_over_observing(self) -> None:
        # Lightning's observer kills this process without a word, up to five seconds after a child has failed.
        from lightning.pytorch.strategies.launchers import subprocess_script

        theirs = subprocess_script._launch_process_observer

        def restore() -> None:
            subprocess_script._launch_process_observer = theirs

        def observe(children: list[subprocess.Popen[bytes]]) -> None:
            self._children = children
            self._watch(self._a_child_is_lost)

        subprocess_script._launch_process_observer = observe
        self._restore = restore

    def _a_child_is_lost(self) -> bool:
        # 128 + signal: all processes agreed to stop, and this one will stop as well.
        return any(child.poll() and child.returncode < 128 for child in self._children)

    def _first_is_lost(self, parent: str | None) -> Callable[[], bool]:
        if parent is not None:
            return lambda: os.getppid() != int(parent)
        seen = False  # where processes are started side by side, the first may not sit yet

        def lost() -> bool:
            nonlocal seen
            empty = self.seats.take() and self.seats.is_empty(0)
            seen = seen or not empty
            return seen and empty

        return lost

    def _watch(self, lost: Callable[[], bool]) -> None:
        def watch() -> None:
            while not self._ended.wait(POLL_SECONDS):
                if lost() and not self._ended.wait(GRACE_SECONDS):
                    self._end_from_here()

        threading.Thread(target=watch, daemon=True, name="watch-processes").start()

    def _end_from_here(self) -> None:
        """End this process from a thread: its main thread waits for one that will never answer."""
        code = self.tell(Failure("another process of this run was lost", LOST, severed=True))
        self._kill_children()
        self.seats.leave()
        sys.stdout.flush()
        os._exit(code)

    def _kill_children(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
