"""Inner Loop Feedback: one learned block feeds a span's output back to its input, and the span runs twice.

Source: Gwilliam et al. 2025, "Accelerate High-Quality Diffusion Models with Inner Loop Feedback", arXiv:2501.13107.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from modules.contracts import AdapterEntry, Handle
from modules.diffusion_host import StepClock
from modules.diffusion_host.hooks import add_hook, remove_hook, unique_name
from modules.guards import GuidanceGuard, check_sampler, check_timesteps
from modules.sites import block_stack, find_transformer
from modules.solvers import LearnedMultistepScheduler, SolverTable
from modules.timestep_swap import TimestepSwap


@dataclass(frozen=True, kw_only=True)
class ILFConfig:
    """All it takes to rebuild the module and its sampler: the adapter's "module" entry.

    Attributes:
        span_start, span_len: the looped blocks b .. b+n-1.
        feedback: for each of the m outer steps, whether it loops.
        timesteps: the m outer timesteps, falling; `guidance`: the scale they were trained for.
        inner_timestep: conditioning of the second pass and what follows: "outer" (the step's own, which makes the
            untrained module the identity) or "target" (the next timestep).
        scale_shape: strengths: "scalar" [n], "per_step" [k, n], "channel" [k, n, D].
        feedback_output: "full" feeds the block's output back, "delta" its difference to the input.
        solver: a `SolverTable` as a dict, or None for the pipeline's own scheduler.
        sampler: what the pipeline's own scheduler has to agree with, see `sampler_entry`.
        call: further keyword arguments that this backbone's pipeline call needs.
    """

    span_start: int
    span_len: int
    feedback: list[bool]
    timesteps: list[int]
    guidance: float
    inner_timestep: str = "outer"
    scale_shape: str = "scalar"
    feedback_output: str = "full"
    solver: dict[str, Any] | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.feedback) != len(self.timesteps):
            raise ValueError(f"feedback lists {len(self.feedback)} steps but timesteps lists {len(self.timesteps)}")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}, which is not one of {', '.join(allowed)}")

    @property
    def span_end(self) -> int:
        """The last looped block."""
        return self.span_start + self.span_len - 1

    @property
    def looped(self) -> int:
        """How many steps use feedback, k."""
        return sum(self.feedback)

    def blocks(self, depth: int) -> int:
        """Blocks executed per image with a backbone of `depth` blocks: m N + k (n + 1)."""
        return len(self.timesteps) * depth + self.looped * (self.span_len + 1)


_CHOICES = {
    "inner_timestep": ("outer", "target"),
    "scale_shape": ("scalar", "per_step", "channel"),
    "feedback_output": ("full", "delta"),
}


class ILFModule(nn.Module):
    """The feedback block F and the strengths s of its injections.

    Shapes: k feedback steps, n blocks in the span, D width.
    Departs from the paper: the block may start as a copy of the span's last one (`init="copy"`), and strengths may
    differ by step and channel.
    """

    def __init__(self, config: ILFConfig, transformer: nn.Module, init: str = "copy") -> None:
        """Raises ValueError where the span leaves the backbone, or a setting could never learn."""
        super().__init__()
        stack = block_stack(transformer)
        first, last = config.span_start, config.span_end
        if not 0 <= first <= last < len(stack):
            raise ValueError(f"the span is blocks {first} to {last}, but the backbone has blocks 0 to {len(stack) - 1}")
        if stack.streams(last).encoder_output is not None:
            raise ValueError(
                f"a {type(stack.blocks[last]).__name__} carries two streams; ILF feeds back single-stream blocks"
            )
        self.config = config
        self.feedback = clean_copy(stack.blocks[last])
        if init == "scratch":
            self.feedback.apply(_reset)
        if config.feedback_output == "delta" and _is_silent(self.feedback):
            # scale 0 keeps the block from learning, and a silent block keeps the scale from learning
            raise ValueError("feedback_output delta with zero-initialised gates cannot learn: use full")
        width = int(cast(Any, stack.blocks[last]).attn1.to_q.in_features)
        shapes: dict[str, tuple[int, ...]] = {
            "scalar": (config.span_len,),
            "per_step": (config.looped, config.span_len),
            "channel": (config.looped, config.span_len, width),
        }
        self.scale = nn.Parameter(torch.zeros(shapes[config.scale_shape]))
        self._row = [sum(config.feedback[:i]) for i in range(len(config.feedback))]

    def train(self, mode: bool = True) -> ILFModule:
        """The feedback block stays as the backbone's blocks are: in train mode DiT's drop class labels at random."""
        super().train(mode)
        self.feedback.eval()
        return self

    def strengths(self, step: int) -> Tensor:
        """The strengths of one outer step: [n] or [n, D]."""
        return self.scale if self.config.scale_shape == "scalar" else self.scale[self._row[step]]

    def forward(self, step: int, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is fed back in an outer step, and how strongly.

        Args:
            step: number of the outer step, for its strengths.
            hidden_BTD: the span's output; the rest are the block's own other arguments.
        Returns:
            the feedback block's output [B, T, D], and the strengths [n] or [n, D].  Both leave one forward, since a
            sharded parameter is whole only there.
        """
        # In training the weights are float32 masters, whatever precision the backbone hands over.
        dtype = self.scale.dtype
        args = tuple(_as(value, dtype) for value in args)
        wide = hidden_BTD.to(dtype)
        fed = cast(Tensor, self.feedback(wide, *args, **{name: _as(value, dtype) for name, value in kwargs.items()}))
        return (fed - wide if self.config.feedback_output == "delta" else fed), self.strengths(step)


class ILFHandle(Handle):
    """ILF at work in a transformer.

    Attributes:
        module: the learned part; it stays outside the transformer's module tree.
        clock: the step clock; `clock.pin(i)` makes every forward outer step i, for training.
        span: the looped blocks.  strengths: of the last looped step, detached; None before one has run.
    """

    def __init__(self, target: Any, module: ILFModule) -> None:
        super().__init__()
        self.module, self.config = module, module.config
        self._transformer = find_transformer(target)
        span = block_stack(self._transformer).blocks[self.config.span_start :][: self.config.span_len]
        self._name = unique_name("ilf")
        self.span, self._inputs = list(span), cast(Any, None)
        self.strengths: Tensor | None = None
        # Bound before our own hooks sit on them: the second pass runs what others hooked, and never ourselves.
        self._runs = [cast(Callable[..., Tensor], block.forward) for block in span]
        self._swap = None
        if self.config.inner_timestep == "target":
            depth = self.config.span_start + self.config.span_len
            self._swap = TimestepSwap(self._transformer, [*self.config.timesteps[1:], 0], self.config.feedback, depth)
        # Hooks that come later run first: the clock has to be set when the others look at it.
        self.clock = StepClock(target)
        if self._swap is not None:
            self._swap.clock = self.clock
        add_hook(span[0], _Enter(self), f"{self._name}.enter", root=self._transformer)
        add_hook(span[-1], _Leave(self), f"{self._name}.leave", root=self._transformer)
        self.clock.on_begin(self._check_schedule)
        self._bypassed = False
        self._pipe = None if isinstance(target, nn.Module) else target
        self._replaced: Any = None
        self._guard: GuidanceGuard | None = None

    def use_sampler(self) -> None:
        """Gives the pipeline the schedule that the module was trained for."""
        self.call_kwargs = {**self.config.call, "guidance_scale": self.config.guidance}
        self.call_kwargs["num_inference_steps"] = len(self.config.timesteps)
        if self._pipe is None:
            self.clock.begin(len(self.config.timesteps))
            return
        check_sampler(self.config.sampler, self._pipe.scheduler)
        if self.config.solver is not None:
            self._replaced, self._pipe.scheduler = self._pipe.scheduler, LearnedMultistepScheduler(**self.config.solver)
        self._guard = GuidanceGuard(self._pipe, self.clock, self.config.guidance)

    def loop(self, first_pass: Tensor) -> Tensor:
        """The span's second pass, given the output of its first [B, T, D]."""
        hidden: Tensor
        hidden, args, kwargs = self._inputs
        self._inputs = None
        step = self.clock.step
        if self._bypassed or not self.config.feedback[step]:
            return first_pass
        outer = kwargs if self._swap is None else self._swap.outer(kwargs)
        fed, strengths = self.module(step, first_pass, *args, **outer)
        self.strengths = strengths.detach()
        for run, strength in zip(self._runs, strengths, strict=True):
            hidden = run(hidden + (strength * fed).to(hidden.dtype), *args, **kwargs)
        return hidden

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The plain backbone: the teacher is these same weights without the loop."""
        before = self._bypassed
        self._bypass(True)
        try:
            yield
        finally:
            self._bypass(before)

    def _bypass(self, bypassed: bool) -> None:
        self._bypassed = bypassed
        if self._swap is not None:
            self._swap.paused = bypassed

    def keep(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the span's input; called by the first block's hook."""
        self._inputs = (hidden, args, kwargs)

    def detach(self) -> None:
        """Gives transformer and pipeline back as they were."""
        if self._guard is not None:
            self._guard.detach()
            self._guard = None
        if self._replaced is not None and self._pipe is not None:
            self._pipe.scheduler, self._replaced = self._replaced, None
        remove_hook(self.span[-1], f"{self._name}.leave", root=self._transformer)
        remove_hook(self.span[0], f"{self._name}.enter", root=self._transformer)
        if self._swap is not None:
            self._swap.detach()
            self._swap = None
        self.clock.detach()

    def _check_schedule(self) -> None:
        check_timesteps(self.config.timesteps, self.clock)


class _Enter(ModelHook):  # type: ignore[misc]
    def __init__(self, handle: ILFHandle) -> None:
        cast(Any, super()).__init__()
        self.handle = handle

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            self.handle.keep(args[0], args[1:], kwargs)
        else:
            self.handle.keep(kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"})
        return args, kwargs


class _Leave(ModelHook):  # type: ignore[misc]
    def __init__(self, handle: ILFHandle) -> None:
        cast(Any, super()).__init__()
        self.handle = handle

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return self.handle.loop(output)


def attach_module(target: Any, module: ILFModule) -> ILFHandle:
    """Runs a transformer with feedback, as in training: a pipeline keeps its own scheduler."""
    return ILFHandle(target, module)


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> ILFHandle:
    """Attaches an exported adapter to a pipeline or a transformer.

    Call the pipeline with `**handle.call_kwargs`: number of steps and guidance are part of what was trained.

    Raises:
        ValueError: the adapter does not fit this backbone.
    """
    transformer = find_transformer(target)
    module = ILFModule(ILFConfig(**manifest.module), transformer)
    module.load_state_dict(tensors)
    reference = next(transformer.parameters())
    module.to(device=reference.device, dtype=reference.dtype).requires_grad_(False).eval()
    handle = ILFHandle(target, module)
    try:
        handle.use_sampler()
    except ValueError:
        handle.detach()
        raise
    return handle


def module_entry(config: ILFConfig | SolverTable) -> dict[str, Any]:
    """The config as JSON values, for the manifest."""
    return asdict(config)


def clean_copy(block: nn.Module) -> nn.Module:
    """A copy of a block without the hooks that sit on it or on its parts: they would bring their owners along."""
    hidden: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for part in block.modules():
            own = vars(part)
            overrides: dict[str, Any] = {name: own.pop(name) for name in ("forward", "_diffusers_hook") if name in own}
            hooks = {name: own[name] for name in own if name.startswith(("_forward_", "_backward_"))}
            hidden.append((part, {**overrides, **hooks}))
            own.update({name: type(value)() for name, value in hooks.items() if isinstance(value, dict)})
        return copy.deepcopy(block)
    finally:
        for part, values in hidden:
            vars(part).update(values)


def centred_span(depth: int, length: int) -> int:
    """The first block of a span of `length` in the middle of `depth` blocks."""
    return (depth - length) // 2


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        cast(Any, module).reset_parameters()


def _is_silent(block: nn.Module) -> bool:
    gate = getattr(getattr(block, "norm1", None), "linear", None)
    return gate is not None and not bool(gate.weight.any()) and not bool(gate.bias.any())
