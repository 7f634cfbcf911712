"""Which sampler step a forward belongs to, without reading a timestep back from the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, cast

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, ModelHook, StateManager
from torch import nn

from modules.contracts import Handle
from modules.diffusion_host.hooks import add_hook, remove_hook, unique_name
from modules.sites import find_transformer


class StepClock(Handle):
    """Counts root forwards along a trajectory.

    A pipeline's `scheduler.set_timesteps` begins a trajectory (so one that an exception cut short leaves no trace),
    every forward of the transformer is the next step.  Where a pipeline calls the transformer several times per step,
    inside diffusers' `cache_context(name)`, steps are counted per name.  Without a pipeline call `begin` by hand; a
    changed input shape then begins a new trajectory too.

    Attributes:
        step: index of the running (or last) forward, -1 before the first.
        num_steps: forwards of this trajectory per context; None where nobody announced it.
        timesteps: the scheduler's timesteps on the host, in sampling order; empty without a scheduler.
        context: name of the running forward's cache context, None outside one.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.transformer: nn.Module = find_transformer(target)
        self.step = -1
        self.num_steps: int | None = None
        self.timesteps: tuple[float, ...] = ()
        self.context: str | None = None
        self._pinned: int | None = None
        self._steps: dict[str | None, int] = {}
        self._shapes: dict[str | None, torch.Size] = {}
        self._on_begin: list[Callable[[], None]] = []
        self._on_step: list[Callable[[], None]] = []
        self._pipe: Any = None if isinstance(target, nn.Module) else target
        self._scheduler: Any = None
        self._name = unique_name("clock")
        add_hook(self.transformer, _RootHook(self), self._name)
        if self._pipe is not None:
            self._scheduler = self._pipe.scheduler
            _listen(self._scheduler, self._read_timesteps)

    def on_begin(self, callback: Callable[[], None], first: bool = False) -> None:
        """Calls back when a trajectory begins, and when features kept so far no longer fit the input's shape."""
        self._on_begin.insert(0 if first else len(self._on_begin), callback)

    def on_step(self, callback: Callable[[], None]) -> None:
        """Calls back before each forward, with `step` and `context` set."""
        self._on_step.append(callback)

    def begin(self, num_steps: int | None = None, timesteps: tuple[float, ...] = ()) -> None:
        """Begins a trajectory by hand; the next forward is step 0."""
        self.num_steps, self.timesteps = num_steps, timesteps
        self.step, self.context = -1, None
        self._steps.clear()
        self._shapes.clear()
        for callback in self._on_begin:
            callback()

    def pin(self, step: int | None) -> None:
        """Makes every forward this step, for training on single steps; None counts again."""
        self._pinned = step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def advance(self, shape: torch.Size, context: str | None) -> None:
        """One root forward is about to run on inputs of this shape; called by the clock's own hook."""
        if self._pinned is not None:
            self.step = self._pinned
        else:
            if self._pipe is not None and self._pipe.scheduler is not self._scheduler:
                self._follow_scheduler()
            if self._shapes.setdefault(context, shape) != shape:
                self._change_shape()
                self._shapes[context] = shape
            self.step = self._steps[context] = self._steps.get(context, -1) + 1
            if self.num_steps is not None and self.step >= self.num_steps:
                raise ValueError(
                    f"the transformer is called for step {self.step + 1} of a trajectory of {self.num_steps}: begin "
                    "a new one with scheduler.set_timesteps(...) or clock.begin(...), and wrap several calls per step "
                    "in diffusers' cache_context"
                )
        self.context = context
        for callback in self._on_step:
            callback()

    def _change_shape(self) -> None:
        if self._scheduler is None:
            self.begin(self.num_steps, self.timesteps)
            return
        # The sampler goes on (a pipeline dropped its guidance half, say): only what was kept is of no use any more.
        for callback in self._on_begin:
            callback()

    def _follow_scheduler(self) -> None:
        # Someone gave the pipeline another scheduler, whose set_timesteps has been called by now.
        _stop_listening(self._scheduler, self._read_timesteps)
        self._scheduler = self._pipe.scheduler
        _listen(self._scheduler, self._read_timesteps)
        self._read_timesteps()

    def _read_timesteps(self) -> None:
        timesteps = tuple(self._scheduler.timesteps.tolist())
        self.begin(len(timesteps), timesteps)

    def detach(self) -> None:
        """Removes the root hook and gives `scheduler.set_timesteps` back."""
        remove_hook(self.transformer, self._name)
        _stop_listening(self._scheduler, self._read_timesteps)
        self._scheduler = self._pipe = None


class _NoState(BaseState):  # type: ignore[misc]
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _RootHook(ModelHook):  # type: ignore[misc]
    """Tells the clock of each forward.  Stateful in diffusers' sense so that cache_context and resets reach it."""

    _is_stateful = True

    def __init__(self, clock: StepClock) -> None:
        cast(Any, super()).__init__()
        self.clock = clock
        self.manager = cast(Any, StateManager)(_NoState)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        context: CacheContext | None = self.manager._context
        self.clock.advance(hidden.shape, None if context is None else context.name)
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        self.clock.begin(self.clock.num_steps, self.clock.timesteps)
        return module


class _Announced:
    """Stands in for a scheduler's `set_timesteps` and tells the listeners after each call."""

    def __init__(self, inner: Callable[..., Any], listeners: list[Callable[[], None]]) -> None:
        update_wrapper(self, inner)  # pipelines inspect the signature to see whether custom timesteps are accepted
        self.inner, self.listeners = inner, listeners

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        for listener in self.listeners:
            listener()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Announced:
        # A copied scheduler is a sampler of its own: the clock must not hear of it, nor be copied along.
        return _Announced(copy.deepcopy(self.inner, memo), [])


def _listen(scheduler: Any, listener: Callable[[], None]) -> None:
    if not isinstance(scheduler.__dict__.get("set_timesteps"), _Announced):
        scheduler.set_timesteps = _Announced(scheduler.set_timesteps, [])
    scheduler.set_timesteps.listeners.append(listener)


def _stop_listening(scheduler: Any, listener: Callable[[], None]) -> None:
    announced = None if scheduler is None else scheduler.__dict__.get("set_timesteps")
    if not isinstance(announced, _Announced):
        return
    if listener in announced.listeners:
        announced.listeners.remove(listener)
    if not announced.listeners:
        del scheduler.__dict__["set_timesteps"]
        if announced.inner != scheduler.set_timesteps:
            scheduler.set_timesteps = announced.inner
