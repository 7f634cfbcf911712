"""The diffusion host: steps are counted right, work is counted as executed, and detaching leaves no trace."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from modules.diffusion_host import StepClock, WorkCounter, add_hook, attach_reuse, remove_hook
from modules.reuse import Delta, EveryN, FirstBlockTest, Hold, StepTable, Taylor
from modules.sites import block_stack
from tests.tiny import (
    cache_context,
    call_kwargs,
    denoise,
    forward,
    generate,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_transformer,
)

MEMBERS = {
    "hold": lambda: (EveryN(3), Hold(), "submodule"),
    "delta": lambda: (EveryN(2), Delta(), "block"),
    "taylor": lambda: (EveryN(3, warmup=2), Taylor(2), "submodule"),
    "first_block": lambda: (FirstBlockTest(0.5), Delta(), "span"),
}


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


# ---- attaching and detaching


@pytest.mark.parametrize("member", MEMBERS)
def test_detach_leaves_no_trace(kind: str, member: str) -> None:
    pipe = tiny_pipeline(kind)
    before = attributes(pipe.transformer), set(vars(pipe.scheduler)), list(pipe.transformer.state_dict())
    plain = generate(pipe)
    with attach_reuse(pipe, *MEMBERS[member]()) as handle, WorkCounter(pipe):
        handle.watches_memory = True
        assert not torch.equal(generate(pipe), plain)
        assert list(pipe.transformer.state_dict()) == before[2]
        assert handle.peak_bytes > 0
    assert (attributes(pipe.transformer), set(vars(pipe.scheduler)), list(pipe.transformer.state_dict())) == before
    assert handle.memory_bytes() == 0
    assert torch.equal(generate(pipe), plain)
    handle.detach()  # once more does nothing
    assert attributes(pipe.transformer) == before[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_handles_detach_in_any_order(order: tuple[int, ...]) -> None:
    pipe = tiny_pixart_pipeline()
    before = attributes(pipe.transformer), set(vars(pipe.scheduler))
    plain = generate(pipe)
    makers = [
        lambda: attach_reuse(pipe, EveryN(3), Hold(), "block"),
        lambda: attach_reuse(pipe, EveryN(2), Delta(), "block"),
        lambda: attach_reuse(pipe, EveryN(2, warmup=2), Hold(), "submodule"),
    ]
    alone = []
    for make in makers:
        with make():
            alone.append(generate(pipe))
    handles = [make() for make in makers]
    for index in order[:2]:
        generate(pipe)
        handles[index].detach()
    assert torch.equal(generate(pipe), alone[order[2]])
    handles[order[2]].detach()
    assert (attributes(pipe.transformer), set(vars(pipe.scheduler))) == before
    assert torch.equal(generate(pipe), plain)


def test_hooks_and_overrides_of_others_survive(kind: str) -> None:
    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return 2 * output

    model = tiny_transformer(kind)
    block = block_stack(model).blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Double(), "double")
    want, before = forward(model, kind), attributes(model)
    with attach_reuse(model, EveryN(2), Hold()):
        forward(model, kind)
    assert attributes(model) == before and torch.equal(forward(model, kind), want)

    name, own = "ours", Double()
    add_hook(block, own, name)
    block._diffusers_hook.remove_hook("double", recurse=False)
    assert torch.equal(forward(model, kind), want)  # ours doubles in its place
    remove_hook(block, name)
    remove_hook(block, name)
    assert not torch.equal(forward(model, kind), want)


def test_an_overridden_forward_is_given_back(kind: str) -> None:
    model = tiny_transformer(kind)
    block = block_stack(model).blocks[0]
    original = block.forward
    override = lambda *args, **kwargs: original(*args, **kwargs) + 1  # noqa: E731
    block.forward = override
    with attach_reuse(model, EveryN(2), Hold()):
        forward(model, kind)
    assert vars(block)["forward"] is override


@pytest.mark.parametrize(
    ("selector", "predictor", "granularity", "span", "message"),
    [
        (EveryN(2), Delta(), "submodule", None, "Delta does not serve granularity 'submodule': use 'block' or 'span'"),
        (FirstBlockTest(), Hold(), "submodule", None, "FirstBlockTest does not serve granularity 'submodule'"),
        (EveryN(2), Taylor(feature="residual"), "submodule", None, "Taylor does not serve granularity 'submodule'"),
        (EveryN(2), Hold(), "layer", None, "granularity is 'layer': use 'block', 'submodule', 'span'"),
        (EveryN(2), Hold(), "block", (1, 2), "span is \\(1, 2\\) but granularity is 'block'"),
        (EveryN(2), Hold(), "span", (2, 9), "within the 4 blocks"),
        (StepTable([[True] * 3]), Hold(), "block", None, "the table has 3 columns but there are 4 units"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_trace(
    kind: str, selector: Any, predictor: Any, granularity: Any, span: Any, message: str
) -> None:
    model = tiny_transformer(kind)
    before = attributes(model)
    with pytest.raises(ValueError, match=message):
        attach_reuse(model, selector, predictor, granularity, span)
    assert attributes(model) == before


# ---- the clock


def test_the_clock_follows_a_pipeline(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    seen = []
    with StepClock(pipe) as clock:
        begun = []
        clock.on_begin(lambda: begun.append(clock.num_steps))
        clock.on_step(lambda: seen.append(clock.step))
        for steps in (5, 3):
            generate(pipe, steps)
            assert clock.num_steps == steps and clock.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2] and begun == [5, 3]


def test_set_timesteps_keeps_its_signature_and_copies_are_deaf() -> None:
    pipe = tiny_pixart_pipeline()
    want = inspect.signature(pipe.scheduler.set_timesteps)
    with StepClock(pipe) as clock:
        assert inspect.signature(pipe.scheduler.set_timesteps) == want
        pipe.scheduler.set_timesteps(4)
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(7)
        assert clock.num_steps == 4 and len(pipe.scheduler.timesteps) == 4 and len(twin.timesteps) == 7


def test_custom_timesteps_reach_the_clock() -> None:
    pipe = tiny_pixart_pipeline()
    with StepClock(pipe) as clock:
        generate(pipe, timesteps=[900, 500, 100])
    assert clock.timesteps == (900, 500, 100) and clock.step == 2


def test_a_scheduler_swapped_in_later_is_followed(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    first = pipe.scheduler
    with attach_reuse(pipe, EveryN(3), Hold()) as handle:
        generate(pipe, 4)
        pipe.scheduler = DDIMScheduler() if kind == "pixart" else DPMSolverMultistepScheduler()
        for _ in range(2):
            once = generate(pipe, 5)
            assert handle.clock.num_steps == 5 and handle.clock.step == 4
        assert torch.equal(once, generate(pipe, 5))
    assert "set_timesteps" not in vars(pipe.scheduler) | vars(first)


@pytest.mark.parametrize("member", MEMBERS)
def test_an_interrupted_trajectory_leaves_nothing_behind(kind: str, member: str) -> None:
    pipe = tiny_pipeline(kind)
    with attach_reuse(pipe, *MEMBERS[member]()) as handle:
        want = generate(pipe)
        bomb = handle.clock.transformer.register_forward_pre_hook(explode_at(handle.clock, 2), with_kwargs=True)
        with pytest.raises(RuntimeError, match="boom"):
            generate(pipe, seed=3)
        bomb.remove()
        assert torch.equal(generate(pipe), want)
        generate(pipe, batch=3)  # another batch size in between
        assert torch.equal(generate(pipe), want)


def explode_at(clock: StepClock, step: int) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if clock.step == step:
            raise RuntimeError("boom")

    return hook


def test_without_a_pipeline_a_new_shape_or_begin_starts_over(kind: str) -> None:
    model = tiny_transformer(kind)
    with StepClock(model) as clock:
        assert [(forward(model, kind, batch), clock.step)[1] for batch in (2, 2, 2, 3, 3)] == [0, 1, 2, 0, 1]
        clock.begin(2)
        forward(model, kind), forward(model, kind)
        with pytest.raises(ValueError, match="is called for step 3 of a trajectory of 2: begin a new one"):
            forward(model, kind)


def test_pinned_steps_do_not_advance(kind: str) -> None:
    model = tiny_transformer(kind)
    with StepClock(model) as clock:
        forward(model, kind)
        clock.pin(7)
        forward(model, kind), forward(model, kind)
        assert clock.step == 7
        clock.pin(None)
        forward(model, kind)
        assert clock.step == 1


def test_two_calls_per_step_keep_apart_by_cache_context(kind: str) -> None:
    """Separate cond and uncond calls give what two models with one call each give."""
    model = tiny_transformer(kind)

    def run(names: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for step, name in itertools.product(range(5), names):
            latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step + 100 * (name == "cond")))
            with cache_context(model, name), torch.no_grad():
                out = model(latents, timestep=torch.tensor([900 - step]), **call_kwargs(kind, 1)).sample
            outputs[name].append(out)
        return outputs

    for member in MEMBERS.values():
        with attach_reuse(model, *member()) as handle:
            both = run(("cond", "uncond"))
            assert handle.clock.step == 4
            for name in ("cond", "uncond"):
                handle.clock.begin()
                assert all(map(torch.equal, run((name,))[name], both[name]))


def test_diffusers_reset_reaches_the_clock(kind: str) -> None:
    model = tiny_transformer(kind)
    with StepClock(model) as clock:
        forward(model, kind)
        model._diffusers_hook.reset_stateful_hooks()
        assert clock.step == -1


def test_a_guidance_half_dropped_midway_goes_on_counting(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    with attach_reuse(pipe, EveryN(4), Hold()) as handle, WorkCounter(pipe) as counter:
        pipe.scheduler.set_timesteps(4)
        for batch in (2, 2, 1, 1):
            forward(pipe.transformer, kind, batch)
        assert handle.clock.step == 3 and counter.blocks == 8  # steps 0 and 2: nothing fits the smaller batch


# ---- speed rules


class Forbid(TorchDispatchMode):
    """Counts reads of device numbers by the host."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("member", "reads"), [("hold", 0), ("delta", 0), ("taylor", 0), ("first_block", 3)])
def test_nothing_is_read_back_during_a_step(kind: str, member: str, reads: int) -> None:
    model = tiny_transformer(kind)
    selector, predictor, granularity = MEMBERS[member]()
    with attach_reuse(model, selector, predictor, granularity), Forbid() as watch:
        for _ in range(4):
            forward(model, kind)
    assert watch.reads == reads


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_compiled_equals_eager(kind: str, member: str) -> None:
    """Through Dynamo, without a code generator: the hooks' Python is what could go wrong."""
    model = tiny_transformer(kind, layers=2)
    with attach_reuse(model, *MEMBERS[member]()) as handle:
        want = denoise(model, kind, 6)
        handle.clock.begin()
        torch._dynamo.reset()
        graphs = CompileCounter()
        got = denoise(torch.compile(model, backend=graphs), kind, 6)
    assert all(map(torch.equal, got, want))
    if member in ("hold", "delta"):  # a full and a skipping variant, and the first step's, before anything is kept
        assert graphs.frame_count <= 3
    torch._dynamo.reset()


def test_all_pipelines_run_under_reuse() -> None:
    sigma = tiny_pixart_pipeline(PixArtSigmaPipeline)
    for pipe in (sigma, tiny_pixart_pipeline(), tiny_pipeline("dit")):
        with attach_reuse(pipe, EveryN(2), Hold(), "submodule"), WorkCounter(pipe) as counter:
            generate(pipe, 4, batch=2)
        assert counter.blocks == 8
