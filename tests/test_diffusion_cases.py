"""Rivals of a diffusion adapter execute what their settings say; the search never gives them less work than asked."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from modules.pipelines import DiTDriver
from tests.tiny import tiny_dit_pipeline
from trainers import diffusion_cases
from trainers.diffusion_cases import (
    Probe,
    cheapest_schedule,
    cheapest_threshold,
    enough_everywhere,
    first_block_case,
    full_steps_of,
    hold_case,
    neighbouring_steps,
    plain_case,
    reference_images,
    standard_cases,
    taylor_case,
)
from trainers.rows import Case

LAYERS, STEPS = 4, 10


@pytest.fixture(scope="module")
def probe():
    driver, inputs, seeds = DiTDriver(tiny_dit_pipeline(LAYERS), {"guidance_scale": 1.5}), [1, 2], [5, 6]
    return Probe(driver=driver, inputs=inputs, seeds=seeds, reference=reference_images(driver, inputs, seeds, STEPS, 1))


def test_plain_sampler_executes_all_blocks_and_repeats_the_reference(probe):
    blocks, quality = probe.run(plain_case(STEPS))
    assert blocks == LAYERS * STEPS and quality > 60


@pytest.mark.parametrize("make", [hold_case, taylor_case])
@pytest.mark.parametrize(("interval", "warmup"), [(2, 1), (3, 2)])
def test_scheduled_reuse_executes_its_full_steps(probe, make, interval, warmup):
    blocks, _ = probe.run(make(probe.driver, interval, warmup, STEPS))
    assert blocks == LAYERS * len(full_steps_of(interval, warmup, STEPS)) < LAYERS * STEPS


def test_first_block_threshold_spans_everything_to_one_block_per_step(probe):
    assert probe.run(first_block_case(probe.driver, 0.0, STEPS))[0] == LAYERS * STEPS
    assert probe.run(first_block_case(probe.driver, 1e9, STEPS))[0] == LAYERS + (STEPS - 1)


@pytest.mark.parametrize("target", [17, 20, 24])
def test_schedule_search_gives_the_fewest_blocks_not_below_the_target(probe, target):
    found = cheapest_schedule(lambda i, w: hold_case(probe.driver, i, w, STEPS), probe, target, STEPS, LAYERS)
    assert target <= probe.run(found)[0] < target + LAYERS


def test_schedule_search_takes_the_best_of_equal_work(probe):
    by_pair = {}

    def make(interval, warmup):
        found = hold_case(probe.driver, interval, warmup, STEPS)
        by_pair[interval, warmup] = probe.run(found)[1]
        return found

    found = cheapest_schedule(make, probe, 20, STEPS, LAYERS)
    assert len(by_pair) > 1 and probe.run(found)[1] == max(by_pair.values())


def test_search_gives_nothing_when_every_schedule_executes_less(probe):
    everything = LAYERS * STEPS
    assert (
        cheapest_schedule(lambda i, w: hold_case(probe.driver, i, w, STEPS), probe, everything, STEPS, LAYERS) is None
    )


def test_threshold_search_does_not_go_below_the_target(probe):
    target = 20
    found = cheapest_threshold(lambda t: first_block_case(probe.driver, t, STEPS), probe, target)
    assert target <= probe.run(found)[0] < LAYERS * STEPS


@pytest.mark.parametrize(
    ("blocks", "steps"), [(88, [10, 11, 12]), (90, [11, 12, 13]), (8, [1, 2]), (150, [18, 19]), (300, [])]
)
def test_plain_neighbours_surround_the_adapter(blocks, steps):
    assert neighbouring_steps(blocks, 8, 20) == steps


def test_standard_cases_surround_the_adapter_and_leave_no_hook(probe, monkeypatch):
    monkeypatch.setattr(diffusion_cases, "_BISECTIONS", 6)

    @contextmanager
    def enter():
        yield {"num_inference_steps": 5}

    cases = standard_cases(Case(name="mine", kind="adapter", enter=enter), probe, full_steps=STEPS)
    assert [case.kind for case in cases[:2]] == ["baseline", "adapter"]
    assert [case.name for case in cases if case.kind == "plain"] == ["4 steps", "5 steps", "6 steps"]
    groups = [case.group for case in cases if case.kind == "untrained"]
    assert groups == ["hold", "TaylorSeer", "TaylorSeer", "FirstBlockCache"]
    assert all(probe.run(case)[0] >= 5 * LAYERS for case in cases if case.kind == "untrained")
    assert len({case.name for case in cases}) == len(cases)
    plain = probe.run(plain_case(STEPS))
    assert plain == probe.run(cases[0])
    assert not any(getattr(module, "_diffusers_hook", None) for module in probe.driver.transformer.modules())


def test_reference_does_not_depend_on_the_batch(probe):
    together = reference_images(probe.driver, probe.inputs, probe.seeds, STEPS, 2)
    torch.testing.assert_close(together, probe.reference, rtol=0, atol=1e-4)


def test_a_threshold_is_lowered_until_all_batches_execute_enough(probe):
    """Of two batches that decide for themselves only the first is looked at while the threshold is searched."""
    both = replace(probe, batches=[(probe.inputs, probe.seeds), ([3, 4], [7, 8])])

    def make(threshold):
        return first_block_case(probe.driver, threshold, STEPS)

    target = 24
    alone, found = cheapest_threshold(make, probe, target), cheapest_threshold(make, both, target)
    assert both.executed(alone) < target <= both.executed(found)
    assert enough_everywhere(make, both, LAYERS * STEPS + 1, 0.1) is None
