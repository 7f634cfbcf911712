"""The rivals of a diffusion adapter: the plain sampler with fewer steps, and untrained reuse at about the same work.

Each untrained member is given the settings that execute the fewest blocks not below the adapter's, and among settings
with equally many the one closest to the reference on the images that time is measured on: the choice favours the rival.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modules.contracts import Granularity, Handle, Predictor, Selector
from modules.diffusion_host import WorkCounter, attach_reuse
from modules.pipelines import DiffusionDriver
from modules.reuse import Delta, EveryN, FirstBlockTest, Hold, Taylor
from modules.sites import finest_granularity
from trainers.image_quality import psnr_db
from trainers.rows import Case, Kind

Rivals = Literal["all", "family", "none"]
_INTERVALS, _WARMUPS = range(2, 7), range(1, 9)
_BISECTIONS = 12
_LOWEST, _LOWERED = 1e-4, 0.85


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A few inputs to try settings on, those that time is measured on.

    Attributes:
        reference: [N, C, H, W] in -1..1, the reference images of these inputs.
        batches: all inputs that quality is measured on, and their seeds, in the batches of that measurement.
    """

    driver: DiffusionDriver
    inputs: Sequence[Any]
    seeds: Sequence[int]
    reference: Tensor
    batches: Sequence[tuple[Sequence[Any], Sequence[int]]] = ()

    def run(self, case: Case) -> tuple[float, float]:
        """Executed blocks per image, and PSNR in dB to the reference."""
        with case.enter() as call, WorkCounter(self.driver.transformer) as counter:
            for module in case.counted():
                counter.also(module)
            images = self.driver.generate(list(self.inputs), list(self.seeds), **call)
        return counter.blocks, psnr_db(images.cpu(), self.reference)

    def executed(self, case: Case) -> float:
        """Executed blocks per image over all batches, which is the work that the report will hold."""
        with case.enter() as call, WorkCounter(self.driver.transformer) as counter:
            for inputs, seeds in self.batches:
                self.driver.generate(list(inputs), list(seeds), **call)
        return counter.blocks / len(self.batches)


def _entering(**call: Any) -> Callable[[], AbstractContextManager[dict[str, Any]]]:
    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        yield call

    return enter


def plain_case(steps: int, *, kind: Kind = "plain", **call: Any) -> Case:
    """The backbone's own sampler at `steps` steps; `call` goes to every call of the pipeline (guidance_scale ...)."""
    return Case(
        name=f"{steps} steps", kind=kind, group="fewer steps", enter=_entering(num_inference_steps=steps, **call)
    )


def adapter_case(name: str, attach: Callable[[], Handle], counted: Callable[[Handle], Iterable[nn.Module]]) -> Case:
    """An adapter.

    Args:
        attach: attaches it to the shared pipeline; called each time, so tensors should be read beforehand.
        counted: the modules of an attached handle whose work counts besides the backbone's.
    """
    attached: list[Handle] = []

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with attach() as handle:
            attached.append(handle)
            try:
                yield handle.call_kwargs
            finally:
                attached.pop()

    return Case(name=name, kind="adapter", enter=enter, counted=lambda: counted(attached[-1]))


def reuse_case(
    driver: DiffusionDriver,
    name: str,
    group: str,
    members: Callable[[], tuple[Selector, Predictor]],
    granularity: Granularity,
    steps: int,
    *,
    kind: Kind = "untrained",
    **call: Any,
) -> Case:
    """The backbone at `steps` steps with untrained members skipping part of its work."""

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with attach_reuse(driver.pipe, *members(), granularity=granularity) as handle:
            yield {"num_inference_steps": steps, **call, **handle.call_kwargs}

    return Case(name=name, kind=kind, group=group, enter=enter)


def hold_case(driver: DiffusionDriver, interval: int, warmup: int, steps: int, **call: Any) -> Case:
    """Every `interval`-th step in full, attention and feed-forward outputs (see `held_units`) held in between."""
    name, (granularity, hold) = f"hold every {interval}, warm-up {warmup}", held_units(driver)
    return reuse_case(driver, name, "hold", lambda: (EveryN(interval, warmup), hold()), granularity, steps, **call)


def held_units(driver: DiffusionDriver) -> tuple[Granularity, type[Hold]]:
    """The finest units of a backbone, and what holds them: outputs of sub-modules, residuals of whole blocks."""
    granularity = finest_granularity(driver.transformer)
    return granularity, Hold if granularity == "submodule" else Delta


def taylor_case(driver: DiffusionDriver, interval: int, warmup: int, steps: int, order: int = 1, **call: Any) -> Case:
    """TaylorSeer (arXiv:2503.06923): as `hold_case`, but extrapolated, in the paper's form."""
    name = f"TaylorSeer every {interval}, warm-up {warmup}, order {order}"
    granularity, held = held_units(driver)

    def members() -> tuple[Selector, Predictor]:
        feature: Literal["output", "residual"] = "residual" if held is Delta else "output"
        return EveryN(interval, warmup), Taylor(order, form="taylor", feature=feature)

    return reuse_case(driver, name, "TaylorSeer", members, granularity, steps, **call)


def first_block_case(driver: DiffusionDriver, threshold: float, steps: int, **call: Any) -> Case:
    """FirstBlockCache: all later blocks are skipped while the first one's residual moves by less than `threshold`."""
    name = f"FirstBlockCache {threshold:.3g}"
    return reuse_case(
        driver, name, "FirstBlockCache", lambda: (FirstBlockTest(threshold), Delta()), "span", steps, **call
    )


def full_steps_of(interval: int, warmup: int, steps: int) -> tuple[int, ...]:
    """Which of `steps` steps `EveryN(interval, warmup)` computes."""
    selector = EveryN(interval, warmup)
    return tuple(step for step in range(steps) if selector.computes(step, 0, None))


def cheapest_schedule(
    make: Callable[[int, int], Case], probe: Probe, target_blocks: float, steps: int, blocks_per_step: int
) -> Case | None:
    """The best of the interval and warm-up pairs with the fewest executed blocks not below `target_blocks`.

    Args:
        make: the case of an interval and a warm-up.
    Returns:
        None when even the fullest schedule that skips anything executes less.
    """
    schedules: dict[tuple[int, ...], tuple[int, int]] = {}
    for pair in product(_INTERVALS, _WARMUPS):
        schedules.setdefault(full_steps_of(*pair, steps), pair)
    for count in sorted({len(full) for full in schedules if len(full) < steps}):
        if count * blocks_per_step < target_blocks:
            continue
        cases = [make(*pair) for full, pair in schedules.items() if len(full) == count]
        measured = [(case, *probe.run(case)) for case in cases]
        enough = [(quality, case) for case, blocks, quality in measured if blocks >= target_blocks]
        if enough:
            return max(enough, key=lambda pair: pair[0])[1]
    return None


def cheapest_threshold(make: Callable[[float], Case], probe: Probe, target_blocks: float) -> Case | None:
    """The case with the largest threshold (by bisection) that still executes `target_blocks`; None if none does.

    What is decided by looking at a batch is decided anew in every batch, so the threshold is then lowered until all
    batches of the evaluation together execute that much.
    """
    threshold = largest_threshold(make, probe, target_blocks)
    return None if threshold is None else enough_everywhere(make, probe, target_blocks, threshold)


def largest_threshold(make: Callable[[float], Case], probe: Probe, target_blocks: float) -> float | None:
    """The largest threshold that executes `target_blocks` on the probe's few inputs; None if none does."""
    low, high = _LOWEST, 10.0
    for _ in range(_BISECTIONS):
        threshold = math.sqrt(low * high)
        low, high = (threshold, high) if probe.run(make(threshold))[0] >= target_blocks else (low, threshold)
    return low if low > _LOWEST else None


def enough_everywhere(
    make: Callable[[float], Case], probe: Probe, target_blocks: float, threshold: float
) -> Case | None:
    """The first case of falling thresholds that executes `target_blocks` over the whole evaluation."""
    while threshold > _LOWEST:
        case = make(threshold)
        if not probe.batches or probe.executed(case) >= target_blocks:
            return case
        threshold *= _LOWERED
    return None


def neighbouring_steps(target_blocks: float, blocks_per_step: int, full_steps: int) -> list[int]:
    """Step counts of the plain sampler around the adapter's work: the next lower one and two that are not below it.

    Two, because the adapter's own overhead can make it slower than a sampler that executes as many blocks.
    """
    enough = math.ceil(target_blocks / blocks_per_step - 1e-9)
    return [steps for steps in (enough - 1, enough, enough + 1) if 1 <= steps < full_steps]


def standard_cases(
    adapter: Case, probe: Probe, *, full_steps: int = 20, rivals: Rivals = "all", **call: Any
) -> list[Case]:
    """Baseline, adapter, and the rivals at about its work.

    Args:
        rivals: anything but "all" leaves them out.
        full_steps: sampler steps of the baseline and of the untrained members.
        call: goes to every call but the adapter's (guidance_scale ...).
    """
    baseline = plain_case(full_steps, kind="baseline", **call)
    if rivals != "all":
        return [baseline, adapter]
    per_step = round(probe.run(baseline)[0] / full_steps)
    return [baseline, adapter, *rivals_at(probe.run(adapter)[0], probe, per_step, full_steps, **call)]


def rivals_at(target: float, probe: Probe, per_step: int, full_steps: int, **call: Any) -> list[Case]:
    """The plain sampler with fewer steps and the untrained members, at about `target` executed blocks per image.

    Args:
        per_step: blocks of one whole step.
    """
    driver = probe.driver
    plain = [plain_case(steps, **call) for steps in neighbouring_steps(target, per_step, full_steps)]
    makers: list[Callable[[int, int], Case]] = [
        lambda interval, warmup: hold_case(driver, interval, warmup, full_steps, **call),
        lambda interval, warmup: taylor_case(driver, interval, warmup, full_steps, 1, **call),
        lambda interval, warmup: taylor_case(driver, interval, warmup, full_steps, 2, **call),
    ]
    untrained = [cheapest_schedule(make, probe, target, full_steps, per_step) for make in makers]
    untrained.append(
        cheapest_threshold(lambda threshold: first_block_case(driver, threshold, full_steps, **call), probe, target)
    )
    return [*plain, *(case for case in untrained if case is not None)]


def reference_images(
    driver: DiffusionDriver, inputs: Sequence[Any], seeds: Sequence[int], steps: int, batch_size: int, **call: Any
) -> Tensor:
    """Images of the plain sampler at many steps, [N, C, H, W] in -1..1 on the CPU."""
    call = {"num_inference_steps": steps, **call}
    batches = batches_of(inputs, seeds, batch_size)
    return torch.cat([driver.generate(list(some), list(own), **call).float().cpu() for some, own in batches])


def batches_of(
    inputs: Sequence[Any], seeds: Sequence[int], batch_size: int
) -> list[tuple[Sequence[Any], Sequence[int]]]:
    """Inputs and seeds in the batches that quality is measured in."""
    starts = range(0, len(inputs), batch_size)
    return [(inputs[start : start + batch_size], seeds[start : start + batch_size]) for start in starts]
