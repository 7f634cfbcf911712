"""The untrained members: equal to diffusers' own caches where those exist, to straight-line references elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from modules.contracts import Predictor
from modules.diffusion_host import WorkCounter, attach_reuse
from modules.diffusion_host.attach import kept_steps
from modules.reuse import Delta, EveryN, FirstBlockTest, Hold, StepTable, Taylor
from modules.sites import block_stack
from tests.tiny import denoise, generate, tiny_pipeline, tiny_transformer

SUBMODULES = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]


def counted(model: nn.Module, kind: str, steps: int) -> tuple[list[Tensor], int, int]:
    """Outputs of a sampling loop, and the sub-modules and multiply-adds that it executed."""
    with WorkCounter(model) as counter:
        outputs = denoise(model, kind, steps)
    assert counter.submodules > 0
    return outputs, counter.submodules, counter.macs


def diffusers_cache(kind: str, steps: int, config: Any) -> tuple[list[Tensor], int, int]:
    model = tiny_transformer(kind)
    apply = apply_first_block_cache if isinstance(config, FirstBlockCacheConfig) else apply_taylorseer_cache
    apply(model, config)
    _set_cache_context(model, CacheContext("cond"))  # these models lack CacheMixin.cache_context
    return counted(model, kind, steps)


def equal(got: tuple[list[Tensor], int, int], want: tuple[list[Tensor], int, int]) -> bool:
    return got[1:] == want[1:] and len(got[0]) == len(want[0]) and all(map(torch.equal, got[0], want[0]))


# ---- equality with diffusers


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("interval", "warmup"), [(1, 2), (2, 1), (3, 3), (5, 3), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taylor_equals_diffusers_taylorseer(
    kind: str, order: int, interval: int, warmup: int, dtype: torch.dtype
) -> None:
    steps = 11
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=dtype,
        cache_identifiers=SUBMODULES,
    )
    want = diffusers_cache(kind, steps, config)
    model = tiny_transformer(kind)
    with attach_reuse(
        model, EveryN.taylorseer(interval, warmup), Taylor(order, form="taylor", dtype=dtype), "submodule"
    ):
        got = counted(model, kind, steps)
    assert equal(got, want)
    plain = counted(model, kind, steps)
    assert (got[1] < plain[1]) == (interval > 1) and equal(got, plain) == (interval == 1)


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_of_whole_blocks_equals_diffusers_taylorseer(kind: str, order: int) -> None:
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+"],
    )
    want = diffusers_cache(kind, 10, config)
    model = tiny_transformer(kind)
    with attach_reuse(model, EveryN.taylorseer(3), Taylor(order, form="taylor"), "block"):
        assert equal(counted(model, kind, 10), want)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.5, 1e9])
def test_first_block_test_equals_diffusers_first_block_cache(kind: str, threshold: float) -> None:
    want = diffusers_cache(kind, 12, FirstBlockCacheConfig(threshold=threshold))
    model = tiny_transformer(kind)
    with attach_reuse(model, FirstBlockTest(threshold), Delta(), "span"):
        got = counted(model, kind, 12)
    assert equal(got, want)
    per_block = 3 if kind == "pixart" else 2
    blocks = got[1] / per_block
    assert {0.0: 48.0, 1e9: 4.0 + 11.0}.get(threshold, blocks) == blocks


def test_some_threshold_skips_some_steps_and_not_others(kind: str) -> None:
    """Otherwise the equality above would only have seen the two trivial cases."""
    skipped = set()
    for threshold in (0.05, 0.2, 0.5):
        model = tiny_transformer(kind)
        with attach_reuse(model, FirstBlockTest(threshold), Delta(), "span"):
            skipped.add(counted(model, kind, 12)[1])
    per_block = 3 if kind == "pixart" else 2
    assert any(15 * per_block < count < 48 * per_block for count in skipped)


def test_equality_holds_inside_a_pipeline_with_guidance(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    with attach_reuse(pipe, EveryN.taylorseer(3, 2), Taylor(2, form="taylor"), "submodule"):
        got = generate(pipe, 8)
    theirs = tiny_pipeline(kind)
    config = TaylorSeerCacheConfig(3, 2, None, 2, torch.float32, cache_identifiers=SUBMODULES)
    apply_taylorseer_cache(theirs.transformer, config)
    _set_cache_context(theirs.transformer, CacheContext("cond"))
    assert torch.equal(got, generate(theirs, 8)) and not torch.equal(got, generate(tiny_pipeline(kind), 8))


# ---- neutral settings and budgets


@pytest.mark.parametrize("granularity", ["block", "submodule", "span", "model"])
@pytest.mark.parametrize("selector", [EveryN(1), StepTable([True] * 6)], ids=["every", "table"])
@pytest.mark.parametrize("predictor", [Hold, lambda: Taylor(2)], ids=["hold", "taylor"])
def test_computing_everything_is_the_plain_model(kind: str, granularity: Any, selector: Any, predictor: Any) -> None:
    model = tiny_transformer(kind)
    want = counted(model, kind, 6)
    with attach_reuse(model, selector, predictor(), granularity):
        assert equal(counted(model, kind, 6), want)


@pytest.mark.parametrize("granularity", ["block", "submodule"])
def test_executed_units_are_those_of_the_table(kind: str, granularity: Any) -> None:
    model = tiny_transformer(kind)
    probe = attach_reuse(model, EveryN(1), Hold(), granularity)
    units = len(probe.unit_names)
    probe.detach()
    table = torch.rand(7, units, generator=torch.Generator().manual_seed(1)) < 0.4
    with attach_reuse(model, StepTable(table), Hold(), granularity), WorkCounter(model) as counter:
        denoise(model, kind, 7)
    table[0] = True  # nothing to reuse yet
    executed = counter.blocks if granularity == "block" else counter.submodules
    assert executed == int(table.sum())


def test_a_span_is_skipped_as_one_and_the_rest_runs(kind: str) -> None:
    model = tiny_transformer(kind, layers=5)
    with attach_reuse(model, EveryN(2), Delta(), "span", (1, 4)) as handle, WorkCounter(model) as counter:
        denoise(model, kind, 6)
    assert handle.unit_names == (
        "transformer_blocks.0..transformer_blocks.0",
        "transformer_blocks.1..transformer_blocks.3",
    )
    assert counter.blocks == 3 * 5 + 3 * 2


def test_a_span_from_the_first_block_needs_no_block_in_front(kind: str) -> None:
    model = tiny_transformer(kind)
    with attach_reuse(model, EveryN(2), Delta(), "span", (0, 4)), WorkCounter(model) as counter:
        denoise(model, kind, 6)
    assert counter.blocks == 3 * 4
    with (
        attach_reuse(model, FirstBlockTest(), Delta(), "span", (0, 4)),
        pytest.raises(ValueError, match="let the span begin at block 1"),
    ):
        denoise(model, kind, 2)


def test_a_table_for_other_steps_is_refused(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    generate(pipe, 4)
    with attach_reuse(pipe, StepTable([True] * 5), Hold()):
        generate(pipe, 5)
        with pytest.raises(ValueError, match="the table has 5 rows but the sampler runs 4 steps"):
            generate(pipe, 4)
        generate(pipe, 5)
    model = pipe.transformer
    with attach_reuse(model, StepTable([True] * 2), Hold()), pytest.raises(ValueError, match="is at step 3"):
        denoise(model, kind, 3)
    with pytest.raises(ValueError, match="must be \\[steps\\] or \\[steps, units\\]"):
        StepTable(torch.ones(2, 2, 2))


@pytest.mark.parametrize(
    ("selector", "full"),
    [
        (EveryN(3), [0, 3, 6, 9]),
        (EveryN(3, warmup=3), [0, 1, 2, 5, 8]),
        (EveryN(3, warmup=2, first=4), [0, 1, 4, 7, 10]),
        (EveryN.taylorseer(5, 3), [0, 1, 2, 4, 9]),
        (EveryN(1, warmup=4), list(range(11))),
    ],
)
def test_every_n_computes_these_steps(selector: EveryN, full: list[int]) -> None:
    assert [step for step in range(11) if selector.computes(step, 0, None)] == full


# ---- what stands in


def block_reference(model: nn.Module, kind: str, table: Tensor, residual: bool) -> list[Tensor]:
    """Hold or delta at blocks, written as plain loops around each block's own forward."""
    step, kept = [-1], {}

    def wrapped(index: int, forward: Any) -> Any:
        def run(hidden: Tensor, **kwargs: Any) -> Tensor:
            step[0] += index == 0
            if table[step[0], index]:
                kept[index] = forward(hidden, **kwargs) - (hidden if residual else 0)
            return kept[index] + (hidden if residual else 0)

        return run

    for index, block in enumerate(block_stack(model).blocks):
        block.forward = wrapped(index, block.forward)
    return denoise(model, kind, len(table))


@pytest.mark.parametrize("predictor", [Hold, Delta])
def test_blocks_are_reused_as_in_a_straight_line(kind: str, predictor: type[Hold]) -> None:
    table = torch.rand(8, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    table[0] = True
    want = block_reference(tiny_transformer(kind), kind, table, residual=predictor is Delta)
    model = tiny_transformer(kind)
    with attach_reuse(model, StepTable(table), predictor(), "block"):
        got = denoise(model, kind, 8)
    # A computed residual block is rounded once more in the reference.
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(got, want, strict=True))


def test_the_current_input_flows_through_a_held_sub_module(kind: str) -> None:
    """Residual and gate are those of the current step: holding all parts of a block is not holding the block."""
    model, outputs = tiny_transformer(kind), {}
    for granularity in ("block", "submodule"):
        with attach_reuse(model, EveryN(2), Hold(), granularity):
            outputs[granularity] = denoise(model, kind, 4)
    assert torch.equal(outputs["block"][0], outputs["submodule"][0])
    assert not torch.allclose(outputs["block"][1], outputs["submodule"][1], rtol=1e-3)


def polynomial(degree: int, seed: int) -> Any:
    coefficients = torch.randn(degree + 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda step: sum(c * step**power for power, c in enumerate(coefficients))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_newton_is_exact_for_polynomials_at_any_spacing(order: int, seed: int) -> None:
    feature = polynomial(order, seed)
    steps = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[: order + 3].sort().values.tolist()
    predictor = Taylor(order, form="newton")
    for step in steps:
        predictor.observe(0, step, (), (feature(step),))
    for step in (steps[-1] + 1, steps[-1] + 5):
        (got,) = predictor.predict(0, step, ())
        assert torch.allclose(got, feature(step), rtol=1e-9, atol=1e-7)


def test_newton_and_taylor_differ_by_what_the_derivative_differs() -> None:
    """For t**2 at spacing N the Taylor form is off by N*k after k steps; both agree on straight lines."""
    for degree, spacing, ahead in [(1, 3, 2), (2, 3, 2)]:
        newton, taylor = Taylor(2, "newton"), Taylor(2, "taylor")
        for step in (0, spacing, 2 * spacing):
            for predictor in (newton, taylor):
                predictor.observe(0, step, (), (torch.tensor(float(step**degree), dtype=torch.float64),))
        got = [float(predictor.predict(0, 2 * spacing + ahead, ())[0]) for predictor in (newton, taylor)]
        truth = (2 * spacing + ahead) ** degree
        assert got[0] == truth and truth - got[1] == (degree == 2) * spacing * ahead


def test_residual_feature_is_added_to_the_current_input() -> None:
    predictor = Taylor(1, feature="residual")
    for step in (0, 1):
        predictor.observe(0, step, (torch.full((2,), 10.0),), (torch.full((2,), 10.0 + step),))
    assert predictor.predict(0, 3, (torch.full((2,), 100.0),))[0].tolist() == [103.0, 103.0]


def test_two_streams_are_extrapolated_each() -> None:
    predictor = Taylor(1)
    for step in (0, 2):
        predictor.observe(0, step, (), (torch.full((2,), 1.0 * step), torch.full((3,), -2.0 * step)))
    assert [stream.tolist() for stream in predictor.predict(0, 3, ())] == [[3.0] * 2, [-6.0] * 3]


def test_a_step_seen_twice_starts_over() -> None:
    predictor = Taylor(1)
    for step, value in ((0, 1.0), (1, 2.0), (1, 5.0)):
        predictor.observe(0, step, (), (torch.tensor([value]),))
    assert predictor.predict(0, 9, ())[0].item() == 5.0


@pytest.mark.parametrize(
    ("make", "copies"), [(Hold, 1), (Delta, 1), (lambda: Taylor(2), 3)], ids=["hold", "delta", "taylor"]
)
def test_memory_is_what_is_held_and_freed_on_reset(kind: str, make: Any, copies: int) -> None:
    model, predictor = tiny_transformer(kind), make()
    with attach_reuse(model, EveryN(2, warmup=3), predictor, "block") as handle:
        denoise(model, kind, 4)
        assert handle.memory_bytes() == copies * 4 * 2 * 16 * 16 * 4  # blocks, batch, tokens, width, bytes
        handle.clock.begin()
        assert handle.memory_bytes() == 0 and not predictor.ready(0)


def test_half_precision_differences_take_half_the_memory(kind: str) -> None:
    held = []
    for dtype in (None, torch.bfloat16):
        model = tiny_transformer(kind)
        with attach_reuse(model, EveryN(2, warmup=3), Taylor(1, dtype=dtype), "submodule") as handle:
            denoise(model, kind, 4)
            held.append(handle.memory_bytes())
    assert held[0] == 2 * held[1]


@pytest.mark.parametrize("predictor", [Hold(), Taylor(2)], ids=["hold", "taylor"])
def test_what_is_kept_carries_no_graph(predictor: Predictor) -> None:
    weight = torch.ones(3, requires_grad=True)
    predictor.observe(0, 0, (), (2 * weight,))
    assert not predictor.predict(0, 1, ())[0].requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EveryN(0), "interval is 0 and warmup is 1"),
        (lambda: Taylor(-1), "order is -1"),
        (lambda: Taylor(form="spline"), "form is 'spline': use 'newton' or 'taylor'"),  # type: ignore[arg-type]
        (lambda: Taylor(feature="input"), "feature is 'input': use 'output' or 'residual'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_name_what_is_allowed(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("history", [1, 2, 3])
def test_slots_are_kept_exactly_while_a_later_prediction_needs_them(history: int) -> None:
    """Against a walk forward that marks, at every skipped step, the steps that its last values are of."""
    generator = torch.Generator().manual_seed(history)
    for _ in range(20):
        computed = (torch.rand(9, 2, generator=generator) < 0.5).tolist()
        want = [[False, False] for _ in computed]
        for unit in range(2):
            for skipped in (step for step in range(9) if not computed[step][unit]):
                used = [step for step in range(skipped) if computed[step][unit]][-history:]
                for step in range(used[0] if used else 0, skipped):
                    # The newest value is needed up to the prediction, an older one until it is pushed out.
                    newer = sum(computed[s][unit] for s in range(step + 1, skipped))
                    want[step][unit] |= newer < history
        found = kept_steps(computed, history)
        for unit in range(2):
            # Before its first computed step a slot is empty, needed or not.
            first = next((step for step in range(9) if computed[step][unit]), 9)
            assert [row[unit] for row in found[first:]] == [row[unit] for row in want[first:]]


@pytest.mark.parametrize("kind_of_slot", [Hold, lambda: Taylor(2)], ids=["hold", "taylor"])
def test_freeing_slots_early_changes_no_output(kind: str, kind_of_slot: Any) -> None:
    table = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    table[0] = True
    units = 12 if kind == "pixart" else 8
    outputs, peaks = [], []
    for steps in (None, 8):  # a trajectory of unknown length keeps everything
        model = tiny_transformer(kind)
        with attach_reuse(model, StepTable(table[:, :units]), kind_of_slot(), "submodule") as handle:
            handle.watches_memory = True
            handle.clock.begin(steps)
            outputs.append(denoise(model, kind, 8))
            peaks.append(handle.peak_bytes)
            assert (handle.memory_bytes() == 0) == (steps == 8)
    assert all(map(torch.equal, *outputs)) and peaks[1] < peaks[0]
