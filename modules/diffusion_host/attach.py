"""Selector and Predictor at block, sub-module or span calls of a diffusion transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from modules.contracts import GRANULARITIES, Features, Granularity, Handle, Predictor, Selector
from modules.diffusion_host.clock import StepClock
from modules.diffusion_host.hooks import add_hook, remove_hook, unique_name
from modules.sites import BlockStack, ModelStreams, Streams, block_stack, find_transformer


@dataclass
class _Unit:
    """What is computed or skipped as one: consecutive modules, entered at the first and left at the last."""

    index: int
    name: str
    modules: tuple[nn.Module, ...]
    streams: tuple[Streams, ...]
    always: bool = False
    compute: bool = True
    kept: bool = True
    inputs: Features = ()


class Student(Protocol):
    """What training puts between a unit and the rest of the model, see `ReuseHandle.student`."""

    def blend(self, unit: int, step: int, inputs: Features, outputs: Features) -> Features:
        """What the model goes on with in place of the computed outputs of a unit."""


class ReuseHandle(Handle):
    """A selector and a predictor at work in a transformer.

    Attributes:
        clock: the step clock; call `clock.begin` by hand where no pipeline drives the transformer.
        unit_names: qualified names of the units, in the order in which selectors count them.
        student: while set, everything is computed and handed to it; selector and predictor have no say.
        watches_memory: measures what is kept whenever a unit was taken note of; `peak_bytes` is the most so far.
    """

    def __init__(self, target: Any, selector: Selector, predictor: Predictor, units: list[_Unit]) -> None:
        super().__init__()
        self.selector, self.predictor = selector, predictor
        self.unit_names = tuple(unit.name for unit in units)
        selector.begin(None, len(units))
        predictor.reset()
        self.student: Student | None = None
        self.watches_memory, self.peak_bytes = False, 0
        self._bypassed = False
        self._units = units
        self._computed: list[list[bool]] = []
        self._kept: list[list[bool]] = []
        self._name = unique_name("reuse")
        self._root = find_transformer(target)
        for unit in units:
            # Units that always run are entered only for a selector that wants to look at their input.
            modules = unit.modules[: int(not selector.static)] if unit.always else unit.modules
            for position, module in enumerate(modules):
                add_hook(module, _UnitHook(self, unit, position), self._name, root=self._root)
        # Hooks that come later run first: the step has to be known when a unit is the whole transformer.
        self.clock = StepClock(target)
        self.clock.on_begin(self._begin)
        self.clock.on_step(self._plan)

    def memory_bytes(self) -> int:
        """Bytes of features kept now."""
        return self.predictor.memory_bytes() + self.selector.memory_bytes()

    def use(self, selector: Selector, predictor: Predictor) -> None:
        """Lets other members of the same granularity take over; what was kept is freed.

        Raises:
            ValueError: one of them is not static while the other members were, or its table does not fit.
        """
        if selector.static != self.selector.static:
            raise ValueError("static and other selectors need different hooks: attach anew")
        selector.begin(self.clock.num_steps, len(self._units))
        self.predictor.reset()
        self.selector, self.predictor = selector, predictor
        self._begin()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The plain backbone: everything is computed, and nothing of it is kept."""
        before, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = before

    def detach(self) -> None:
        """Gives the transformer and its scheduler back as they were, and frees what was kept."""
        for unit in self._units:
            for module in unit.modules:
                remove_hook(module, self._name, root=self._root)
        self.clock.detach()
        self.predictor.reset()
        self.selector.begin(None, len(self._units))

    def _begin(self) -> None:
        self.predictor.reset()
        steps, units = self.clock.num_steps, range(len(self._units))
        self.selector.begin(steps, len(units))
        self._computed, self._kept = [], []
        if steps is not None and self.selector.static:
            self._computed = [[self.selector.computes(step, unit, None) for unit in units] for step in range(steps)]
            self._kept = kept_steps(self._computed, self.predictor.history)

    def _plan(self) -> None:
        self.selector.context = self.predictor.context = self.clock.context
        step = self.clock.step
        known = step < len(self._computed)
        for unit in self._units:
            unit.inputs = ()
            unit.kept = self._kept[step][unit.index] if known else True
            if self._bypassed or self.student is not None or not self.selector.static:
                unit.compute = True
            else:
                wanted = self._computed[step][unit.index] if known else self.selector.computes(step, unit.index, None)
                unit.compute = wanted or unit.always or not self.predictor.ready(unit.index)

    def _wants(self, unit: _Unit, hidden: Tensor | None) -> bool:
        wanted = self.selector.computes(self.clock.step, unit.index, hidden)
        return wanted or unit.always or not self.predictor.ready(unit.index)

    def finish(self, unit: _Unit, output: Any, streams: Streams, kwargs: dict[str, Any]) -> Any:
        """What a computed unit gives, after it has been taken note of; called by the unit's own hook."""
        if self._bypassed:
            return output
        outputs = streams.unpack(output)
        if self.student is not None:
            return streams.pack(self.student.blend(unit.index, self.clock.step, unit.inputs, outputs), kwargs)
        if unit.kept:
            self.predictor.observe(unit.index, self.clock.step, unit.inputs, outputs)
            if self.watches_memory:
                self.peak_bytes = max(self.peak_bytes, self.memory_bytes())
        else:
            self.predictor.release(unit.index)
        return output

    def predict(self, unit: _Unit) -> Features:
        """What stands in for a unit; called by the unit's own hook."""
        outputs = self.predictor.predict(unit.index, self.clock.step, unit.inputs)
        if not unit.kept:
            self.predictor.release(unit.index)
        return outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look(self, unit: _Unit, hidden: Tensor) -> None:
        """Lets a selector that is not static decide about a unit; called by the unit's own hook."""
        unit.compute = self._bypassed or self.student is not None or self._wants(unit, hidden)


class _UnitHook(ModelHook):  # type: ignore[misc]
    """Sits on each module of a unit.  A skipped unit predicts at its first module and passes through the others."""

    def __init__(self, handle: ReuseHandle, unit: _Unit, position: int) -> None:
        cast(Any, super()).__init__()
        self.handle, self.unit, self.streams = handle, unit, unit.streams[position]
        self.first, self.last = position == 0, position == len(unit.modules) - 1

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unit, handle = self.unit, self.handle
        if self.first:
            unit.inputs = self.streams.read(args, kwargs)
            if not handle.selector.static:
                handle.look(unit, unit.inputs[0])
        if unit.compute:
            output = cast(Any, self.fn_ref).original_forward(*args, **kwargs)
            if self.last and not unit.always:
                output = handle.finish(unit, output, self.streams, kwargs)
            if self.last:
                unit.inputs = ()
            return output
        if not self.first:
            return self.streams.pack(self.streams.read(args, kwargs), kwargs)
        outputs = handle.predict(unit)
        unit.inputs = ()
        return self.streams.pack(outputs, kwargs)


def attached_reuse(target: Any) -> list[ReuseHandle]:
    """Every handle that is attached to a transformer, or to a pipeline's, whoever attached it."""
    found: dict[int, ReuseHandle] = {}
    for module in find_transformer(target).modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if isinstance(hook, _UnitHook):
                found[id(hook.handle)] = hook.handle
    return list(found.values())


def kept_steps(computed: list[list[bool]], history: int) -> list[list[bool]]:
    """After which steps a unit's slot is still needed: [steps][units].

    A slot with the last `history` computed values is needed after a step if a later skipped step comes before
    `history` further computed ones.
    """
    kept = [[False] * len(row) for row in computed]
    for unit in range(len(computed[0]) if computed else 0):
        between = history  # computed steps up to the next skipped one; without any there are enough
        for step in range(len(computed) - 1, -1, -1):
            kept[step][unit] = between < history
            between = between + 1 if computed[step][unit] else 0
    return kept


def attach_reuse(
    target: Any,
    selector: Selector,
    predictor: Predictor,
    granularity: Granularity = "block",
    span: tuple[int, int] | None = None,
) -> ReuseHandle:
    """Lets a selector skip units of a transformer and a predictor stand in for them.

    Nothing is read back to the host during a step unless the selector says so.  A unit without anything to predict
    from is computed whatever the selector says.  Training gradients do not flow into what was kept.

    Args:
        target: a diffusers pipeline (its scheduler then drives the clock), or its transformer.
        granularity: what one unit is.  "block": a whole block, unit i is block i.  "submodule": an attention or
            feed-forward module, whose output is reused before gate and residual, so the current input still flows
            through.  "span": unit 1 is the blocks `span` as one, unit 0 the blocks before, always computed.  "model":
            unit 0 is the whole transformer, from latents to prediction.
        span: first block and one past the last, for granularity "span"; from the second to the last if left out.
    Raises:
        TypeError, ValueError: a target, granularity or span that does not exist, or that the two members do not serve.
    """
    units = _units(target, granularity, span)
    for member in (selector, predictor):
        if granularity not in member.granularities:
            raise ValueError(
                f"{type(member).__name__} does not serve granularity {granularity!r}: "
                f"use {' or '.join(map(repr, member.granularities))}, or another member"
            )
    return ReuseHandle(target, selector, predictor, units)


def _units(target: Any, granularity: Granularity, span: tuple[int, int] | None) -> list[_Unit]:
    transformer = find_transformer(target)
    stack = block_stack(transformer)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: use {', '.join(map(repr, GRANULARITIES))}")
    if span is not None and granularity != "span":
        raise ValueError(f"span is {span} but granularity is {granularity!r}: leave span out or use granularity 'span'")
    if granularity == "model":
        return [_Unit(0, type(transformer).__name__, (transformer,), (ModelStreams(0, 0),))]
    if granularity == "span":
        return _span_units(stack, span or (1, len(stack)))
    if granularity == "block":
        return [
            _Unit(index, name, (block,), (stack.streams(index),))
            for index, (name, block) in enumerate(zip(stack.names, stack.blocks, strict=True))
        ]
    named = [
        (f"{stack.names[index]}.{name}", part)
        for index in range(len(stack))
        for name, part in stack.submodules(index).items()
    ]
    return [_Unit(index, name, (part,), (Streams(0, 0),)) for index, (name, part) in enumerate(named)]


def _span_units(stack: BlockStack, span: tuple[int, int]) -> list[_Unit]:
    start, stop = span
    if not 0 <= start < stop <= len(stack):
        raise ValueError(f"span is {span}, but it must be (first, one past last) within the {len(stack)} blocks")
    return [
        _Unit(
            index,
            f"{stack.names[first]}..{stack.names[last - 1]}" if last > first else "",
            stack.blocks[first:last],
            tuple(stack.streams(block) for block in range(first, last)),
            always=index == 0,
        )
        for index, (first, last) in enumerate(((0, start), (start, stop)))
    ]
