"""Paired timing: every round runs each candidate once beside the baseline, so that drift of the machine cancels out.

What is timed is a whole call (text encoder, sampler loop, decoder) by the host's clock, with the device synchronised on
both sides: that is what a user waits for, and events on the device's own clock would miss the host's share.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_MIN_ROUNDS = 5
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

Prepare = Callable[[], AbstractContextManager[Callable[[], object]]]
"""Sets a candidate up (outside the clock) and yields the call that is timed."""


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Attributes:
        latency_s: median seconds of one call.
        speedup: median over the rounds of baseline seconds / own seconds, both of the same round.
        speedup_range: lowest and highest of those ratios.
        seconds: one figure per round, in the order of the rounds.
    """

    latency_s: float
    speedup: float
    speedup_range: tuple[float, float]
    seconds: tuple[float, ...]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; nothing to do on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep the collector from striking in the middle of a measurement."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    candidates: Mapping[str, Prepare],
    baseline: str,
    *,
    device: torch.device,
    rounds: int = 7,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time the candidates in turns, baseline among them, in one process.

    Each round runs every candidate once, in an order shuffled anew from `seed`: none always follows the same other one.

    Args:
        candidates: by name, a context manager that sets the candidate up outside the clock and yields the call to time.
        baseline: the name that the speedups are against.
        device: is synchronised before the clock starts and before it stops.
        rounds: timed rounds, at least 5.
        warmup: untimed calls of each candidate before the first round.
    Raises:
        ValueError: baseline is not a candidate, or there are fewer than 5 rounds.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(candidates)}")
    if rounds < _MIN_ROUNDS:
        raise ValueError(f"rounds is {rounds}; a median with a range needs at least {_MIN_ROUNDS}")
    for prepare in candidates.values():
        with prepare() as call:
            for _ in range(warmup):
                call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order, rng = list(candidates), random.Random(seed)
    with _without_garbage_collection():
        for _ in range(rounds):
            gc.collect()
            rng.shuffle(order)
            for name in order:
                with candidates[name]() as call:
                    seconds[name].append(_seconds(call, device))
    return {name: _summary(own, seconds[baseline]) for name, own in seconds.items()}


def _summary(own: list[float], baseline: list[float]) -> Timing:
    ratios = [theirs / ours for theirs, ours in zip(baseline, own, strict=True)]
    return Timing(statistics.median(own), statistics.median(ratios), (min(ratios), max(ratios)), tuple(own))


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes held at the worst moment of one call, weights included.

    On CUDA: the allocator's peak.  On Linux without a GPU: the process' resident high-water mark, set back before the
    call where the kernel lets us; it also holds the interpreter and whatever the allocator has not returned, so compare
    rows of one report only.  Where the mark cannot be set back: what is resident after the call.  Without /proc: the
    process' peak so far.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    gc.collect()
    field = "VmHWM" if _reset_high_water() else "VmRSS"
    call()
    return _resident_bytes(field)


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text("5")  # Linux: 5 sets VmHWM back to what is resident now
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    if not _STATUS.exists():
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
