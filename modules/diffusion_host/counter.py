"""Counting the work that is really executed, whoever skips the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modules.contracts import Handle
from modules.sites import block_stack, find_transformer, submodules


class WorkCounter(Handle):
    """Counts executed sub-modules and linear multiply-adds of a transformer.

    It listens to the last linear layer of each sub-module, so a unit counts if and only if its arithmetic ran, be it
    ours, diffusers' or another library's cache that decides.  One call counts once, whatever its batch.  Meant for a
    pass of its own, not for a timed one.

    Attributes:
        submodules: calls of sub-modules (attn1, attn2, ff) since the last `reset`.
        macs: multiply-adds of all linear layers, for the whole batch; the products inside attention are left out.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.transformer = find_transformer(target)
        self._removers: list[RemovableHandle] = []
        blocks = block_stack(self.transformer).blocks
        self._per_block = len(submodules(blocks[0]))
        self.reset()
        for block in blocks:
            self._watch_block(block)
        self._watch_linears(self.transformer)

    @property
    def blocks(self) -> float:
        """Executed sub-modules in units of whole blocks; fractional where parts of blocks ran."""
        return self.submodules / self._per_block

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

    def detach(self) -> None:
        """Stops counting; the counts stay readable."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()

    def _watch_block(self, block: nn.Module) -> None:
        for part in submodules(block).values():
            self._removers.append(_last_linear(part).register_forward_pre_hook(_uncompiled(self._count_submodule)))

    def _watch_linears(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                self._removers.append(part.register_forward_pre_hook(_uncompiled(self._count_macs)))

    def _count_submodule(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.submodules += 1

    def _count_macs(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.macs += args[0].numel() * cast(nn.Linear, module).out_features


def _last_linear(part: nn.Module) -> nn.Module:
    """The output projection of an attention or feed-forward module: what runs last if anything of it runs."""
    if isinstance(to_out := getattr(part, "to_out", None), nn.ModuleList):
        return to_out[0]
    return [layer for layer in cast(nn.ModuleList, part.net) if not isinstance(layer, nn.Dropout)][-1]


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    return cast(Callable[..., None], cast(Any, torch.compiler.disable)(hook))
