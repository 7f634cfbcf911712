"""The diffusion host: steps are counted right, work is counted as executed, and detaching leaves no trace."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, ModelHook, _set_cache_context
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.diffusion_host import StepClock, WorkCounter, add_hook, attach_reuse, remove_hook
from modules.reuse import Delta, EveryN, FirstBlockTest, Hold, StepTable, Taylor
from modules.sites import Streams, block_stack, find_transformer, submodules
from tests.tiny import (
    PIXART_CALL,
    call_kwargs,
    denoise,
    generate,
    tiny_dit,
    tiny_pipeline,
    tiny_pixart,
    tiny_pixart_pipeline,
    tiny_transformer,
)

KINDS = ("pixart", "dit")
MEMBERS = {
    "hold": lambda: (EveryN(3), Hold(), "submodule"),
    "delta": lambda: (EveryN(2), Delta(), "block"),
    "taylor": lambda: (EveryN(3, warmup=2), Taylor(2), "submodule"),
    "first_block": lambda: (FirstBlockTest(0.5), Delta(), "span"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def forward(model: nn.Module, kind: str, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        return model(latents, timestep=torch.full((batch,), 500), **call_kwargs(kind, batch)).sample


@contextmanager
def cache_context(model: nn.Module, name: str) -> Iterator[None]:
    """What diffusers' CacheMixin.cache_context does, for models that do not inherit it."""
    _set_cache_context(model, CacheContext(name))
    yield
    _set_cache_context(model, None)


# ---- sites


def test_every_block_and_sub_module_is_found(kind: str) -> None:
    stack = block_stack(tiny_transformer(kind, layers=3))
    names = ["attn1", "attn2", "ff"] if kind == "pixart" else ["attn1", "ff"]
    assert stack.names == ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2")
    assert [list(stack.submodules(i)) for i in range(3)] == [names] * 3


def test_every_block_matters_in_the_tiny_models(kind: str) -> None:
    model = tiny_transformer(kind)
    want = forward(model, kind)
    for part in [part for block in block_stack(model).blocks for part in submodules(block).values()]:
        remover = part.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        assert not torch.allclose(forward(model, kind), want, rtol=1e-3)
        remover.remove()


def test_targets_without_a_supported_transformer_are_refused() -> None:
    with pytest.raises(TypeError, match="a Tensor has no transformer: give a diffusers pipeline or a DiTTransformer"):
        find_transformer(torch.zeros(1))
    with pytest.raises(ValueError, match="a Linear is not supported: modules attach to DiTTransformer2DModel and Pix"):
        find_transformer(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a Linear has no attn1, attn2 or ff"):
        submodules(nn.Linear(1, 1))


def test_pipelines_models_and_compiled_models_lead_to_the_same_transformer() -> None:
    pipe = tiny_pixart_pipeline()
    assert (
        find_transformer(pipe)
        is find_transformer(pipe.transformer)
        is find_transformer(torch.compile(pipe.transformer))
    )


@pytest.mark.parametrize(
    ("block", "double"), [(BasicTransformerBlock, 0), (FluxTransformerBlock, 1), (JointTransformerBlock, 1)]
)
def test_streams_read_and_rebuild_what_a_block_takes_and_returns(block: type[nn.Module], double: int) -> None:
    from modules.sites import _streams

    hidden, text = torch.zeros(1), torch.ones(1)
    streams = _streams(block)
    want = (hidden, text)[: 1 + double]
    assert streams.read((), {"hidden_states": hidden, "encoder_hidden_states": text}) == want
    output = (text, hidden) if double else hidden
    assert streams.unpack(output) == want and streams.pack(streams.unpack(output)) == output
    arguments = list(inspect.signature(block.forward).parameters)[1:]
    positional = tuple({"hidden_states": hidden, "encoder_hidden_states": text}.get(name) for name in arguments)
    assert streams.read(positional, {}) == want


def test_streams_in_image_first_order() -> None:
    streams = Streams(0, 0, 1, 1)
    pair = (torch.zeros(1), torch.ones(1))
    assert streams.unpack(pair) == streams.pack(pair) == pair


# ---- attaching and detaching


@pytest.mark.parametrize("member", MEMBERS)
def test_detach_leaves_no_trace(kind: str, member: str) -> None:
    pipe = tiny_pipeline(kind)
    before = attributes(pipe.transformer), set(vars(pipe.scheduler)), list(pipe.transformer.state_dict())
    plain = generate(pipe)
    with attach_reuse(pipe, *MEMBERS[member]()) as handle, WorkCounter(pipe):
        assert not torch.equal(generate(pipe), plain)
        assert list(pipe.transformer.state_dict()) == before[2]
        assert handle.memory_bytes() > 0
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


# ---- counting work


def test_a_full_forward_counts_every_block_once(kind: str) -> None:
    model = tiny_transformer(kind)
    with WorkCounter(model) as counter:
        forward(model, kind)
        assert counter.work() == {"blocks": 4, "submodules": 12 if kind == "pixart" else 8, "macs": counter.macs}
        once = counter.macs
        forward(model, kind, batch=4)
        assert counter.macs == 3 * once and counter.blocks == 8
        counter.reset()
        assert counter.work() == {"blocks": 0, "submodules": 0, "macs": 0}
        counter.also(copy.deepcopy(tiny_transformer(kind).transformer_blocks[0]))
    forward(model, kind)
    assert counter.blocks == 0


def test_macs_agree_with_a_count_by_hand() -> None:
    model, batch, tokens, text, width = tiny_pixart(layers=2), 3, 16, 5, 16
    with WorkCounter(model) as counter:
        forward(model, "pixart", batch)
    block = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2  # self, cross, mlp; keys and values of the text
    embedding = 256 * width + width**2 + 6 * width**2  # two layers of the timestep, one to shifts and scales
    caption = text * (12 * width + width**2)
    assert counter.macs == batch * (2 * block + embedding + caption + tokens * width * 2 * 2 * 8)


def test_also_counts_a_block_outside(kind: str) -> None:
    model = tiny_transformer(kind)
    extra = copy.deepcopy(model.transformer_blocks[0])
    with WorkCounter(model) as counter:
        counter.also(extra)
        model.transformer_blocks[1].register_forward_hook(lambda module, args, out: extra(out, **kept))
        kept: dict[str, Any] = {}
        if kind == "pixart":
            kept = {"encoder_hidden_states": torch.zeros(2, 5, 16), "timestep": torch.zeros(2, 96)}
        else:
            kept = {"timestep": torch.full((2,), 5), "class_labels": torch.zeros(2, dtype=torch.long)}
        forward(model, kind)
    assert counter.blocks == 5


def test_what_others_skip_is_not_counted(kind: str) -> None:
    model = tiny_transformer(kind)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e9))
    with WorkCounter(model) as counter, cache_context(model, "cond"):
        forward(model, kind), forward(model, kind)
    assert counter.blocks == 4 + 1


def test_a_skipped_attention_skips_its_keys_and_values() -> None:
    model, table = tiny_pixart(), torch.ones(2, 12, dtype=torch.bool)
    table[1, 1] = False  # attn2 of the first block
    with WorkCounter(model) as counter, attach_reuse(model, StepTable(table), Hold(), "submodule"):
        forward(model, "pixart")
        full = counter.macs
        forward(model, "pixart")
    assert 2 * full - counter.macs == 2 * (16 * 2 * 16**2 + 5 * 2 * 16**2)
    assert counter.blocks == pytest.approx(8 - 1 / 3)


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


@pytest.mark.parametrize("member", MEMBERS)
def test_compiled_equals_eager(kind: str, member: str) -> None:
    """Through Dynamo, without a code generator: the hooks' Python is what could go wrong."""
    model = tiny_transformer(kind, layers=2)
    with attach_reuse(model, *MEMBERS[member]()) as handle:
        want = denoise(model, kind, 6)
        handle.clock.begin()
        torch._dynamo.reset()
        got = denoise(torch.compile(model, backend="eager"), kind, 6)
    assert all(map(torch.equal, got, want))
    torch._dynamo.reset()


def test_all_pipelines_run_under_reuse() -> None:
    sigma = tiny_pixart_pipeline(PixArtSigmaPipeline)
    for pipe in (sigma, tiny_pixart_pipeline(), tiny_pipeline("dit")):
        with attach_reuse(pipe, EveryN(2), Hold(), "submodule"), WorkCounter(pipe) as counter:
            generate(pipe, 4, batch=2)
        assert counter.blocks == 8
    assert tiny_dit().config.num_embeds_ada_norm == 1000 and PIXART_CALL["use_resolution_binning"] is False
