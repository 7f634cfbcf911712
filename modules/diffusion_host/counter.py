"""Counting the work that is really executed, whoever skips the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modules.contracts import Handle
from modules.sites import block_stack, find_transformer, last_linears


class WorkCounter(Handle):
    """Counts executed sub-modules and linear multiply-adds of a transformer.

    It listens to the last linear layer of each sub-module, so a unit counts if and only if its arithmetic ran, be it
    ours, diffusers' or another library's cache that decides.  One call counts once, whatever its batch.  Meant for a
    pass of its own, not for a timed one.

    Attributes:
        submodules: calls of sub-modules since the last `reset`; a single block of Flux counts as one.
        macs: multiply-adds of all linear layers, for the whole batch; the products inside attention are left out.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.transformer = find_transformer(target)
        self._removers: list[RemovableHandle] = []
        self.reset()
        for block in block_stack(self.transformer).blocks:
            self._watch_block(block)
        self._watch_linears(self.transformer)

    @property
    def blocks(self) -> float:
        """Executed sub-modules in units of whole blocks; fractional where parts of blocks ran."""
        return sum(calls / parts for parts, calls in self._calls.items())

    def work(self) -> dict[str, float]:
        """The counts under the report's names: blocks, submodules, macs."""
        return {"blocks": self.blocks, "submodules": self.submodules, "macs": self.macs}

    def also(self, block: nn.Module) -> None:
        """Counts a block outside the transformer too, such as a feedback block."""
        self._watch_block(block)
        self._watch_linears(block)

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.submodules = 0
        self.macs = 0
        self._calls: Counter[int] = Counter()  # by how many parts the called part's block has

    def detach(self) -> None:
        """Stops counting; the counts stay readable."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()

    def _watch_block(self, block: nn.Module) -> None:
        linears = last_linears(block)
        for linear in linears:
            count = partial(self._count_submodule, len(linears))
            self._removers.append(linear.register_forward_pre_hook(_uncompiled(count)))

    def _watch_linears(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                self._removers.append(part.register_forward_pre_hook(_uncompiled(self._count_macs)))

    def _count_submodule(self, parts: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.submodules += 1
        self._calls[parts] += 1

    def _count_macs(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.macs += args[0].numel() * cast(nn.Linear, module).out_features


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    return cast(Callable[..., None], cast(Any, torch.compiler.disable)(hook))
