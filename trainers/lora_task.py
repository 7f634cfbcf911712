"""What tasks have in common whose backbone may get LoRA that is trained beside the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import Tensor, nn

from checkpoints.manifest import describe, fingerprint
from modules.lora import add_lora, lora_off, lora_tensors, remove_lora
from trainers.base import FrozenBackboneTask
from trainers.config import RecipeBase
from trainers.lora_settings import LoraSettings


class LoraTask(FrozenBackboneTask):
    """A frozen backbone, the module that learns, and with `lora.rank` LoRA in the backbone's linear layers.

    LoRA's parts hang in the backbone's layers and belong to `learned`, as its child `lora`: they are trained, kept in
    checkpoints and gathered as all that learns.

    Attributes:
        lora_settings: the recipe's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        learned: nn.Module,
        recipe: RecipeBase,
        lora: LoraSettings,
        copied: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(backbone, learned, recipe, copied)
        self.lora_settings = lora
        self.identity = fingerprint(backbone), describe(backbone)
        # Counted and not kept: a list of them would keep alive what a strategy has replaced by shards.
        sizes = [parameter.numel() for parameter in backbone.parameters()]
        self._frozen = {"tensors": len(sizes), "parameters": sum(sizes)}
        if lora.rank:
            parts = add_lora(backbone, lora.model_dump())
            self.learned.lora = nn.ModuleDict({name.replace(".", "-"): part for name, part in parts.items()})
            self.learned.lora.float().requires_grad_(True)
            self.note_shapes()

    def lora_parts(self) -> dict[str, nn.ModuleList]:
        """(A, B, dropout) of what is exported, by the name of the backbone's layer; empty without LoRA."""
        parts = cast(nn.ModuleDict, getattr(self.exported, "lora", {}))
        return {name.replace("-", "."): cast(nn.ModuleList, part) for name, part in parts.items()}

    def lora_tensors(self) -> dict[str, Tensor]:
        """What an adapter stores of it, by name."""
        return lora_tensors(self.lora_parts())

    def lora_group(self) -> list[dict[str, Any]]:
        """LoRA's optimizer group, with a learning rate of its own; empty without LoRA."""
        if not self.lora_settings.rank:
            return []
        rate = self.recipe.optimizer.lr * self.lora_settings.lr_scale
        return [{"params": list(cast(nn.Module, self.learned.lora).parameters()), "lr": rate}]

    def without_lora(self) -> Any:
        """Inside, the backbone as it was."""
        return lora_off(self.backbone) if self.lora_settings.rank else nullcontext()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, no dropout in what is shared with the backbone's layers."""
        training = self.learned.training
        self.learned.eval()
        try:
            yield
        finally:
            self.learned.train(training)

    def parameter_table(self) -> list[dict[str, Any]]:
        """As for every method; what LoRA added to the backbone is not frozen and counted once."""
        rows = super().parameter_table()
        return [*rows[:-1], rows[-1] | self._frozen]

    def adapter_target(self) -> Any:
        """The backbone, without what LoRA put into it."""
        if self.lora_settings.rank:
            remove_lora(self.backbone)
        return self.backbone
