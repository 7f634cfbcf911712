"""Paired timing: ratios of the same round, warm-up first, one run per round and candidate, the collector off."""

import gc
import time
from contextlib import contextmanager

import pytest
import torch

from trainers.timing import alternate, peak_memory

CPU = torch.device("cpu")


class Sleeper:
    """A candidate that sleeps as long as it is told to and writes down what happened."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, seconds

    @contextmanager
    def __call__(self):
        self.log.append(("enter", self.name))
        yield self._run
        self.log.append(("leave", self.name))

    def _run(self):
        self.log.append(("run", self.name, gc.isenabled()))
        time.sleep(self.seconds)


def test_speedup_is_the_median_of_ratios_within_a_round():
    candidates = {"slow": Sleeper("slow", [], 0.04), "fast": Sleeper("fast", [], 0.01)}
    timings = alternate(candidates, "slow", device=CPU, rounds=5)
    fast = timings["fast"]
    assert timings["slow"].speedup == 1 and timings["slow"].speedup_range == (1, 1)
    ratios = [slow / own for slow, own in zip(timings["slow"].seconds, fast.seconds, strict=True)]
    assert fast.speedup == sorted(ratios)[2] and fast.speedup_range == (min(ratios), max(ratios))
    assert 2 < fast.speedup < 4.5 and fast.latency_s == sorted(fast.seconds)[2]


def test_a_machine_that_slows_down_leaves_the_ratio_alone():
    """Each round takes longer than the one before and the ratio stays."""
    runs = 0

    @contextmanager
    def drifting(seconds):
        def run():
            nonlocal runs
            runs += 1
            time.sleep(seconds * (1 + (runs - 1) // 2))

        yield run

    timing = alternate({"a": lambda: drifting(0.012), "b": lambda: drifting(0.006)}, "a", device=CPU, rounds=5)["b"]
    assert timing.speedup == pytest.approx(2, rel=0.3) and timing.seconds[-1] > 2 * timing.seconds[0]


def test_every_round_runs_each_candidate_once_between_enter_and_leave_without_the_collector():
    log, names = [], ["a", "b", "c"]
    alternate({name: Sleeper(name, log, 0) for name in names}, "a", device=CPU, rounds=6, warmup=2)
    runs = [entry for entry in log if entry[0] == "run"]
    warm, timed = runs[:6], runs[6:]
    assert [entry[1] for entry in warm] == ["a", "a", "b", "b", "c", "c"]
    rounds = [[entry[1] for entry in timed[start : start + 3]] for start in range(0, 18, 3)]
    assert all(sorted(one) == names for one in rounds) and len({tuple(one) for one in rounds}) > 1
    assert not any(collecting for *_, collecting in timed) and gc.isenabled()
    nested = log[9:]
    assert all([entry[0] for entry in nested[i : i + 3]] == ["enter", "run", "leave"] for i in range(3, len(nested), 3))


def test_order_depends_on_the_seed_alone():
    def order(seed):
        log = []
        alternate({name: Sleeper(name, log, 0) for name in "abcd"}, "a", device=CPU, rounds=5, seed=seed)
        return [entry[1] for entry in log if entry[0] == "run"]

    assert order(1) == order(1) != order(2)


def test_collector_comes_back_after_an_error():
    @contextmanager
    def broken():
        yield lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        alternate({"a": broken}, "a", device=CPU, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("baseline", "rounds", "words"), [("x", 5, "'x' is not one of a"), ("a", 4, "at least 5")])
def test_wrong_settings_are_refused(baseline, rounds, words):
    with pytest.raises(ValueError, match=words):
        alternate({"a": Sleeper("a", [], 0)}, baseline, device=CPU, rounds=rounds)


def test_peak_memory_sees_what_is_freed_before_the_end():
    def need(megabytes):
        def call():
            torch.ones(megabytes * 2**18).sum()

        return call

    small, large = peak_memory(need(1), CPU), peak_memory(need(300), CPU)
    again = peak_memory(need(1), CPU)
    if again > large - 100 * 2**20:
        pytest.skip("this kernel does not let a process set its high-water mark back")
    assert large - small > 200 * 2**20
