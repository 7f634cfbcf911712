"""Running the first blocks of a transformer at one timestep and all that follows at another."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from modules.diffusion_host import StepClock
from modules.diffusion_host.hooks import add_hook, remove_hook, unique_name
from modules.sites import block_stack


class TimestepSwap:
    """On chosen steps the transformer gets the next timestep, and its first blocks are handed the step's own.

    The conditioning that blocks receive as `timestep` is the integer itself in DiT, and the vector of `adaln_single`
    in PixArt.
    """

    clock: StepClock  # set by the owner, who makes it last: hooks that come later run first

    def __init__(self, transformer: nn.Module, following: list[int], chosen: list[bool], depth: int) -> None:
        """`following`: the next timestep of each step.  `depth`: blocks 0 .. depth-1 keep the step's own."""
        self.chosen, self.transformer = chosen, transformer
        self._table = torch.tensor(following, device=next(self.transformer.parameters()).device)
        self._forward = inspect.signature(type(self.transformer).forward)
        self._blocks = block_stack(self.transformer).blocks[:depth]
        self._name = unique_name("timestep")
        self._own: Any = None
        self.paused = False  # then every step gets its own timestep
        add_hook(self.transformer, _Root(self), self._name)
        for block in self._blocks:
            add_hook(block, _Block(self), self._name, root=self.transformer)

    def swap(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The transformer's arguments with the next timestep in place of its own."""
        self._own = None
        if self.paused or not self.chosen[self.clock.step]:
            return args, kwargs
        bound = self._forward.bind(self.transformer, *args, **kwargs).arguments
        timestep: Tensor = bound["timestep"]
        self._own = self._conditioning(timestep, bound)
        changed = {name: value for name, value in bound.items() if name != "self"}
        changed["timestep"] = self._table[self.clock.step].to(timestep.dtype).expand_as(timestep)
        return (), changed

    def _conditioning(self, timestep: Tensor, bound: dict[str, Any]) -> Tensor:
        embed = getattr(self.transformer, "adaln_single", None)
        if embed is None:
            return timestep
        hidden = bound["hidden_states"]
        conditions = bound.get("added_cond_kwargs")
        return cast(Tensor, embed(timestep, conditions, batch_size=len(hidden), hidden_dtype=hidden.dtype)[0])

    def outer(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A first block's arguments with the step's own conditioning."""
        if self._own is None:
            return kwargs
        return {**kwargs, "timestep": self._own}

    def detach(self) -> None:
        """Removes the hooks."""
        for block in self._blocks:
            remove_hook(block, self._name, root=self.transformer)
        remove_hook(self.transformer, self._name)


class _Root(ModelHook):  # type: ignore[misc]
    def __init__(self, swap: TimestepSwap) -> None:
        cast(Any, super()).__init__()
        self.swap = swap

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.swap.swap(args, kwargs)


class _Block(ModelHook):  # type: ignore[misc]
    def __init__(self, swap: TimestepSwap) -> None:
        cast(Any, super()).__init__()
        self.swap = swap

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, self.swap.outer(kwargs)
