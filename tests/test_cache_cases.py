"""Rivals of learned caches: CacheQuant's schedule is the best segmentation, every operating point has its own."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.pipelines import driver, load_pipeline
from tests.test_report import row
from tests.tiny import tiny_pipeline
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_harmonica import task_of
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, driver_of
from trainers import diffusion_cases
from trainers.cache_cases import cache_setup, dp_case, dp_segments
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe, reference_images
from trainers.report import measure_cases
from trainers.training import build_task
from trainers.verdict import equal_latency_verdict, verdict_text


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("seed", range(3))
def test_dp_schedule_is_the_best_of_all_segmentations(count: int, seed: int) -> None:
    distances = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed)).fill_diagonal_(0)

    def cost(starts: list[int]) -> float:
        return sum(float(distances[max(s for s in starts if s <= step), step]) for step in range(7))

    found = dp_segments(distances, count)
    others = [[0, *rest] for rest in combinations(range(1, 7), count - 1)]
    assert found in others and cost(found) == pytest.approx(min(map(cost, others)))


def test_dp_schedule_executes_no_less_than_asked() -> None:
    running = driver_of(tiny_pipeline("dit"), "dit")
    reference = reference_images(running, INPUTS["dit"], SEEDS, 6, 4, guidance_scale=GUIDANCE)
    probe = Probe(driver=running, inputs=INPUTS["dit"], seeds=SEEDS, reference=reference)
    case = dp_case(running, torch.rand(6, 6), 2.5, guidance_scale=GUIDANCE)
    assert probe.run(case)[0] == 3 * 4 and case.group == "DP schedule"


def test_every_operating_point_is_measured_beside_rivals_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion_cases, "_BISECTIONS", 3)
    name = save_tiny("dit", tmp_path)
    task = build_task(tiny_recipe(name))
    task.export_adapter(tmp_path / "adapter")
    running = driver(load_pipeline(name), name)
    config = EvaluateConfig.model_validate(
        {"adapter": str(tmp_path), "evaluation": {"inputs": 3, "timing_batch": 2, "batch_size": 2}}
    )
    setup = cache_setup(running, tmp_path / "adapter", config)
    assert [case.name for case in setup.cases if case.kind == "adapter"] == ["forecast 50%", "forecast 33%"]
    assert len({case.name for case in setup.cases}) == len(setup.cases)
    assert {"2 steps", "3 steps", "DP schedule, 2 of 6", "DP schedule, 3 of 6"} <= {case.name for case in setup.cases}
    groups = {case.group for case in setup.cases if case.kind in ("plain", "untrained")}
    assert groups == {"fewer steps", "hold", "TaylorSeer", "FirstBlockCache", "DP schedule"}
    probe = Probe(driver=running, inputs=setup.inputs, seeds=setup.seeds, reference=setup.reference)
    work = {case.name: probe.run(case) for case in setup.cases}
    assert work["6 steps"][0] == 24 and work["6 steps"][1] > 60  # the reference is the full run
    family = [case.name for case in setup.cases if case.name.startswith("its own")]
    ops = ("hold", "Taylor 1", "Taylor 2")
    assert family == [f"its own table at {share}, {op}" for share in ("50%", "33%") for op in ops]
    assert all(work[name][0] == work[f"forecast {name.split()[4].rstrip(',')}"][0] for name in family)
    assert (work["forecast 50%"][0], work["forecast 33%"][0]) == (12, 8)
    points = [case for case in setup.cases if case.kind in ("baseline", "adapter")]
    settings = {"repeats": 5, "batch_size": 2, "timing_batch": 1, "quality_fns": {}}
    rows = measure_cases(running, points, setup.inputs, setup.seeds, setup.reference, **settings)[1:]
    prediction = 2 * 8 * 8 * 8 * 4  # halves of guidance, channels with variances, size, bytes; latents are half of it
    assert [row.work["cache_bytes"] for row in rows] == [2 * 1.5 * prediction] * 2
    assert not any(getattr(module, "_diffusers_hook", None) for module in running.transformer.modules())


def test_router_and_forecast_are_measured_beside_their_own_steps(tmp_path: Path) -> None:
    changes = {"module.granularity": "model", "module.reuse_op": "linear", "module.steps": "6"}
    task = task_of(save_tiny("dit", tmp_path), **changes)
    task.export_adapter(tmp_path / "adapter")
    config = EvaluateConfig.model_validate(
        {"adapter": str(tmp_path), "evaluation": {"inputs": 2, "timing_batch": 2, "rivals": "family"}}
    )
    setup = cache_setup(task.running, tmp_path / "adapter", config)
    probe = Probe(driver=task.running, inputs=setup.inputs, seeds=setup.seeds, reference=setup.reference)
    own = {case.name.removeprefix("harmonica "): probe.run(case) for case in setup.cases if case.kind == "adapter"}
    ops = ("hold", "Taylor 1", "Taylor 2")
    family = {case.name: probe.run(case) for case in setup.cases if case.kind == "peer"}
    assert len(own) == 2 and list(family) == [f"its own table at {share}, {op}" for share in own for op in ops]
    for share, (blocks, _) in own.items():
        assert [family[f"its own table at {share}, {op}"][0] for op in ops] == [blocks] * 3
    assert len({quality for _, quality in family.values()}) > len(own)  # they are not all the same


def test_each_operating_point_gets_a_verdict() -> None:
    rows = [
        row("20 steps", "baseline", 1.0, 100.0),
        row("half", "adapter", 0.5, 40.0),
        row("third", "adapter", 0.35, 30.0),
        row("11 steps", "plain", 0.55, 35.0, "fewer steps"),
        row("7 steps", "plain", 0.36, 31.0, "fewer steps"),
    ]
    verdict = equal_latency_verdict(rows)
    assert verdict["adapter"] == "half" and verdict["wins"]
    (third,) = verdict["points"]
    assert third["adapter"] == "third" and not third["wins"]
    text = verdict_text(verdict)
    assert "**half** reaches 40.00 dB" in text and "It loses to 7 steps" in text
    assert "points" not in equal_latency_verdict(rows[:2])


def test_images_do_not_depend_on_other_points(tmp_path: Path) -> None:
    """Going over to a point and back leaves no trace of it."""
    name = save_tiny("dit", tmp_path)
    task = build_task(tiny_recipe(name))
    with task.attach_exported() as handle:

        def images(share: float) -> Tensor:
            handle.use(share)
            return task.running.generate([1, 2], [3, 4], **handle.call_kwargs)

        first, second = handle.shares
        assert torch.equal(images(first), (images(second), images(first))[1])
