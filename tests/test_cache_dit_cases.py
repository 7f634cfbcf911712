"""cache-dit as a peer: it skips what it says, and leaves nothing behind; without it the report says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.pipelines import driver, load_pipeline
from tests.tiny import tiny_pipeline
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, driver_of
from trainers import cache_cases, cache_dit_cases, diffusion_cases
from trainers.cache_cases import cache_setup
from trainers.cache_dit_cases import MISSING, dbcache_case, dbcache_cases
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe, batches_of, reference_images
from trainers.training import build_task

STEPS, LAYERS = 8, 4
needed = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed")


def probe_of(kind: str) -> Probe:
    running = driver_of(tiny_pipeline(kind, LAYERS), kind)
    reference = reference_images(running, INPUTS[kind], SEEDS, STEPS, 2, guidance_scale=GUIDANCE)
    batches = batches_of(INPUTS[kind], SEEDS, 2)
    return Probe(driver=running, inputs=INPUTS[kind], seeds=SEEDS, reference=reference, batches=batches)


@needed
@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_thresholds_span_everything_to_the_first_block(kind: str, taylor: bool) -> None:
    probe = probe_of(kind)
    runs = {
        threshold: probe.run(dbcache_case(probe.driver, threshold, 2, taylor, STEPS, guidance_scale=GUIDANCE))
        for threshold in (1e-9, 1e9)
    }
    assert runs[1e-9][0] == LAYERS * STEPS and runs[1e-9][1] > 60
    assert runs[1e9][0] == 2 * LAYERS + (STEPS - 2) and runs[1e9][1] < runs[1e-9][1]


@needed
@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_it_leaves_the_pipeline_as_it_was(kind: str) -> None:
    probe = probe_of(kind)
    model, pipe = probe.driver.transformer, probe.driver.pipe

    def state() -> dict[str, Any]:
        parts = {f"{name}.{key}": value for name, part in model.named_modules() for key, value in vars(part).items()}
        return {**parts, **vars(pipe), **{f"class {key}": value for key, value in vars(type(pipe)).items()}}

    before, names = state(), list(model.state_dict())
    images = probe.driver.generate(INPUTS[kind], SEEDS, num_inference_steps=STEPS)
    with pytest.raises(RuntimeError), dbcache_case(probe.driver, 0.5, 2, True, STEPS).enter():
        assert vars(model).get("forward") is not before.get(".forward")
        raise RuntimeError
    after = state()
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    assert names == list(model.state_dict())
    assert torch.equal(images, probe.driver.generate(INPUTS[kind], SEEDS, num_inference_steps=STEPS))


@needed
def test_the_search_executes_no_less_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_cases, "_BISECTIONS", 6)
    probe = probe_of("pixart")
    found = dbcache_cases(probe, 20, STEPS, guidance_scale=GUIDANCE)
    assert [case.group for case in found] == ["DBCache", "DBCache with Taylor"]
    assert all(case.kind == "peer" and probe.executed(case) >= 20 for case in found)
    assert dbcache_cases(probe, LAYERS * STEPS + 1, STEPS, guidance_scale=GUIDANCE) == []


def test_a_report_without_the_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_dit_cases.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(diffusion_cases, "_BISECTIONS", 1)
    monkeypatch.setattr(cache_cases, "rivals_at", lambda *_, **__: [])
    name = save_tiny("dit", tmp_path)
    build_task(tiny_recipe(name)).export_adapter(tmp_path / "adapter")

    def setup(**settings: Any) -> Any:
        measured = {"inputs": 2, "timing_batch": 2, "batch_size": 2, **settings}
        config = EvaluateConfig.model_validate({"adapter": str(tmp_path), "evaluation": measured})
        return cache_setup(driver(load_pipeline(name), name), tmp_path / "adapter", config)

    full = setup()
    assert full.left_out == [MISSING] and not any("DBCache" in case.name for case in full.cases)
    few = setup(rivals="none")
    assert [case.kind for case in few.cases] == ["baseline", "adapter", "adapter"] and few.left_out == []
    family = [case.group for case in setup(rivals="family").cases[3:]]
    assert family == [f"its own table, {op}" for op in ("hold", "Taylor 1", "Taylor 2")] * 2
