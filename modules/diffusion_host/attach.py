"""Selector and Predictor at block, sub-module or span calls of a diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from modules.contracts import GRANULARITIES, Features, Granularity, Handle, Predictor, Selector
from modules.diffusion_host.clock import StepClock
from modules.diffusion_host.hooks import add_hook, remove_hook, unique_name
from modules.sites import BlockStack, Streams, block_stack, find_transformer


@dataclass
class _Unit:
    """What is computed or skipped as one: consecutive modules, entered at the first and left at the last."""

    index: int
    name: str
    modules: tuple[nn.Module, ...]
    streams: tuple[Streams, ...]
    always: bool = False
    compute: bool = True
    inputs: Features = ()


class ReuseHandle(Handle):
    """A selector and a predictor at work in a transformer.

    Attributes:
        clock: the step clock; call `clock.begin` by hand where no pipeline drives the transformer.
        unit_names: qualified names of the units, in the order in which selectors count them.
    """

    def __init__(self, target: Any, selector: Selector, predictor: Predictor, units: list[_Unit]) -> None:
        super().__init__()
        self.selector, self.predictor = selector, predictor
        self.unit_names = tuple(unit.name for unit in units)
        selector.begin(None, len(units))
        predictor.reset()
        self.clock = StepClock(target)
        self.clock.on_begin(self._begin)
        self.clock.on_step(self._plan)
        self._units = units
        self._name = unique_name("reuse")
        for unit in units:
            # Units that always run are entered only for a selector that wants to look at their input.
            modules = unit.modules[: int(not selector.static)] if unit.always else unit.modules
            for position, module in enumerate(modules):
                add_hook(module, _UnitHook(self, unit, position), self._name, root=self.clock.transformer)

    def memory_bytes(self) -> int:
        """Bytes of features kept now."""
        return self.predictor.memory_bytes()

    def detach(self) -> None:
        """Gives the transformer and its scheduler back as they were, and frees what was kept."""
        for unit in self._units:
            for module in unit.modules:
                remove_hook(module, self._name, root=self.clock.transformer)
        self.clock.detach()
        self.predictor.reset()

    def _begin(self) -> None:
        self.predictor.reset()
        self.selector.begin(self.clock.num_steps, len(self._units))

    def _plan(self) -> None:
        self.selector.context = self.predictor.context = self.clock.context
        for unit in self._units:
            unit.inputs = ()
            unit.compute = not self.selector.static or self._wants(unit, None)

    def _wants(self, unit: _Unit, hidden: Tensor | None) -> bool:
        wanted = self.selector.computes(self.clock.step, unit.index, hidden)
        return wanted or unit.always or not self.predictor.ready(unit.index)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look(self, unit: _Unit, hidden: Tensor) -> None:
        """Lets a selector that is not static decide about a unit; called by the unit's own hook."""
        unit.compute = self._wants(unit, hidden)


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
                outputs = self.streams.unpack(output)
                handle.predictor.observe(unit.index, handle.clock.step, unit.inputs, outputs)
            if self.last:
                unit.inputs = ()
            return output
        if not self.first:
            return self.streams.pack(self.streams.read(args, kwargs))
        outputs = handle.predictor.predict(unit.index, handle.clock.step, unit.inputs)
        unit.inputs = ()
        return self.streams.pack(outputs)


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
            through.  "span": unit 1 is the blocks `span` as one, unit 0 the blocks before, always computed.
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
    stack = block_stack(find_transformer(target))
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: use {', '.join(map(repr, GRANULARITIES))}")
    if span is not None and granularity != "span":
        raise ValueError(f"span is {span} but granularity is {granularity!r}: leave span out or use granularity 'span'")
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
