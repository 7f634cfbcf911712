"""What a recipe may say about LoRA on its backbone, whatever the method."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trainers.config import Section


class LoraSettings(Section):
    """LoRA on the backbone's linear layers, through PEFT."""

    rank: int = Field(default=0, ge=0, description="rank of LoRA on the backbone; 0 leaves the backbone as it is")
    alpha: float = Field(default=16.0, gt=0, description="LoRA's scale, times rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="LoRA's dropout")
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="names of the backbone's linear layers that get LoRA",
    )
    lr_scale: float = Field(default=0.25, gt=0, description="learning rate of LoRA, times optimizer.lr")

    def entry(self) -> dict[str, Any] | None:
        """What an adapter stores of it; None without LoRA."""
        return self.model_dump(include={"rank", "alpha", "dropout", "targets"}) if self.rank else None
