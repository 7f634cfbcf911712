"""What a learned cache is measured against: every operating point beside the rivals at its work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import method_module, read_tensors
from checkpoints.manifest import read_manifest
from modules.contracts import Predictor
from modules.harmonica import predictor_of
from modules.learned_cache import CacheHandle, OperatingPoint
from modules.pipelines import DiffusionDriver
from modules.reuse import Hold, StepTable, Taylor
from modules.sites import block_stack
from trainers.cache_dit_cases import MISSING, dbcache_cases, installed
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import (
    Probe,
    Rivals,
    held_units,
    plain_case,
    reuse_case,
    rivals_at,
)
from trainers.diffusion_evaluation import ground_of
from trainers.evaluation import EvaluationSetup
from trainers.rows import Case

_DP_INPUTS = 8


def cache_setup(driver: DiffusionDriver, adapter: Path, config: EvaluateConfig) -> EvaluationSetup:
    """The full run, every operating point of the adapter, and at each of them the plain sampler and untrained reuse.

    The reference is the full run itself: a cache is asked to repeat it.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    manifest, tensors = read_manifest(adapter), read_tensors(adapter)
    steps, rivals = len(manifest.module["timesteps"]), config.evaluation.rivals
    ground = ground_of(driver, manifest, config, steps)

    def attach() -> CacheHandle:
        handle: CacheHandle = method_module(manifest.method).attach(driver.pipe, manifest, tensors)
        return handle

    cases = learned_cache_cases(manifest.method, attach, ground.probe, steps, rivals, **ground.call)
    return ground.setup(cases, left_out=[] if installed() or rivals != "all" else [MISSING])


def learned_cache_cases(
    name: str, attach: Callable[[], CacheHandle], probe: Probe, steps: int, rivals: Rivals = "all", **call: Any
) -> list[Case]:
    """Baseline, the adapter at each operating point (the one it attaches with first), and the rivals of each.

    The untrained members of its family at each point's own table tell what the table and what the forecast is worth.
    """
    with attach() as handle:
        first, granularity = handle.points[handle.default], handle.granularity
        points = sorted(handle.points, key=lambda point: (point.compute != first.compute, -point.compute))
    baseline = plain_case(steps, kind="baseline", **call)
    # Points that differ by less than a percent are one row.
    titles: dict[str, OperatingPoint] = {}
    for point in points:
        titles.setdefault(f"{point.compute:.0%}", point)
    own = [point_case(f"{name} {title}", attach, point.compute) for title, point in titles.items()]
    if rivals == "none":
        return [baseline, *own]
    family = []
    for (title, point), (op, reuse) in product(titles.items(), _FAMILY.items()):
        if reuse != own_op(first.predictor()):
            make = partial(_members, point.table, predictor_of(op, granularity=granularity))
            named = (f"its own table at {title}, {reuse}", f"its own table, {reuse}")
            family.append(reuse_case(probe.driver, *named, make, granularity, steps, kind="peer", **call))
    if rivals == "family":
        return [baseline, *own, *family]
    found: dict[str, Case] = {}
    per_step, schedule = round(probe.run(baseline)[0] / steps), _dp_schedules(probe, steps, call)
    for case in own:
        work = probe.run(case)[0]
        beside = rivals_at(work, probe, per_step, steps, **call)
        beside.append(dp_case(probe.driver, schedule, work / per_step, **call))
        beside += dbcache_cases(probe, work, steps, **call) if installed() else []
        found.update({rival.name: rival for rival in beside})
    return [baseline, *own, *family, *found.values()]


def _members(table: Tensor, make: Callable[[], Predictor]) -> tuple[StepTable, Predictor]:
    return StepTable(table), make()


_FAMILY = {"hold": "hold", "taylor1": "Taylor 1", "taylor2": "Taylor 2"}


def own_op(predictor: Predictor) -> str:
    """What an adapter's own predictor is called among its family; a learned one is none of the others."""
    if isinstance(predictor, Taylor):
        return f"Taylor {predictor.order}"
    return "hold" if isinstance(predictor, Hold) else "learned"


def point_case(name: str, attach: Callable[[], CacheHandle], compute: float) -> Case:
    """An adapter at one of its operating points."""

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with attach() as handle:
            handle.use(compute)
            yield handle.call_kwargs

    return Case(name=name, kind="adapter", enter=enter)


# CacheQuant's schedule.


def dp_segments(distances: Tensor, count: int) -> list[int]:
    """Where each of `count` segments of the steps begins, so that features change least within segments.

    Source: CacheQuant (Liu et al. 2025), which sums the L1 distances of a segment's features to its first one and
    minimises over all segmentations by dynamic programming.

    Args:
        distances: [T, T], of the features of steps; entry [s, t] is read for s <= t.
    """
    steps = len(distances)
    inside = [[0.0] * (steps + 1) for _ in range(steps)]  # cost of the segment s .. e-1
    for start in range(steps):
        for end in range(start + 1, steps + 1):
            inside[start][end] = inside[start][end - 1] + float(distances[start, end - 1])
    best = [(inside[0][end], [0]) for end in range(steps + 1)]
    for segments in range(2, count + 1):
        best = [
            min(
                ((best[cut][0] + inside[cut][end], [*best[cut][1], cut]) for cut in range(segments - 1, end)),
                default=(float("inf"), []),
            )
            for end in range(steps + 1)
        ]
    return best[steps][1]


@torch.no_grad()
def _dp_schedules(probe: Probe, steps: int, call: dict[str, Any]) -> Tensor:
    """Distances [T, T] between the last block's outputs over the steps of a full run, on the first probe inputs."""
    driver, features = probe.driver, list[Tensor]()
    stack = block_stack(driver.transformer)
    streams = stack.streams(len(stack) - 1)

    def keep(module: Any, args: Any, output: Any) -> None:
        features.append(streams.unpack(output)[0].detach().float())

    remover = stack.blocks[-1].register_forward_hook(keep)
    try:
        inputs, seeds = list(probe.inputs[:_DP_INPUTS]), list(probe.seeds[:_DP_INPUTS])
        driver.generate(inputs, seeds, num_inference_steps=steps, **call)
    finally:
        remover.remove()
    return torch.stack([torch.stack([(b - a).abs().mean() for b in features]) for a in features])


def dp_case(driver: DiffusionDriver, distances: Tensor, computed: float, **call: Any) -> Case:
    """CacheQuant's schedule with at least `computed` full steps, outputs of attention and feed-forward held between."""
    steps = len(distances)
    count = min(steps, max(1, math.ceil(computed - 1e-9)))
    table = [step in set(dp_segments(distances, count)) for step in range(steps)]
    granularity, held = held_units(driver)

    def members() -> tuple[StepTable, Predictor]:
        return StepTable(table), held()

    name = f"DP schedule, {count} of {steps}"
    return reuse_case(driver, name, "DP schedule", members, granularity, steps, **call)
