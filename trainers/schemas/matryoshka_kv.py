"""What a MatryoshkaKV recipe may say (docs/methods/matryoshka_kv.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from trainers.config import Section
from trainers.context_settings import ContextRecipe
from trainers.lora_settings import LoraSettings


class Module(Section):
    """The projections, and the ranks that they are used at."""

    interval: PositiveInt | None = Field(
        default=None, description="ranks are multiples of it; null takes an eighth of the head size"
    )
    pca_rows: PositiveInt = Field(default=128, description="rows of the training data that PCA is taken of")
    budgets: list[float] = Field(
        default=[0.75, 0.5, 0.375, 0.25], description="mean ranks, as shares of the head size, that tables are made for"
    )
    budget: float = Field(default=0.5, description="the one of budgets that is used unless the user says otherwise")
    search: Literal["curves", "batched", "exact"] = Field(
        default="curves",
        description="how ranks are chosen: curves measures each by itself, batched and exact again and again",
    )
    refine: int = Field(
        default=0,
        ge=0,
        description="sweeps after the search that trade steps between units while the divergence falls, two "
        "measurements per unit each",
    )
    search_rows: PositiveInt = Field(default=8, description="rows of the training data that ranks are judged on")

    @field_validator("budgets")
    @classmethod
    def _budgets_are_shares(cls, value: list[float]) -> list[float]:
        if not value or any(not 0 < budget < 1 for budget in value):
            raise ValueError("a list of numbers between 0 and 1")
        return value


class Objective(Section):
    """What the truncated model is asked to say."""

    kl_weight: float = Field(
        default=0.25, ge=0, le=1, description="of the divergence from the model without projections"
    )
    ce_weight: float = Field(default=0.75, ge=0, le=1, description="of the cross entropy with the text")


class Lora(LoraSettings):
    """The backbone is trained along, through LoRA: fine-tuning on a task, with the cache narrow from the start."""

    alone: int = Field(
        default=0, ge=0, description="first updates that train LoRA alone, at full rank and by the text's cross entropy"
    )


class Recipe(ContextRecipe):
    """MatryoshkaKV (arXiv:2410.14731)."""

    method: Literal["matryoshka_kv"] = Field(default="matryoshka_kv", description="MatryoshkaKV")
    module: Module = Field(default_factory=Module, description="projections and ranks")
    objective: Objective = Field(default_factory=Objective, description="what the truncated model is asked to say")
    lora: Lora = Field(default_factory=Lora, description="training the backbone along")

    @model_validator(mode="after")
    def _lora_agrees(self) -> Recipe:
        if not self.lora.rank:
            return self
        if self.trainer.ema:
            raise ValueError(
                "trainer.ema averages the projections alone: set it to 0 where lora.rank trains the backbone too"
            )
        if self.lora.alone >= self.trainer.max_steps:
            raise ValueError(
                f"lora.alone is {self.lora.alone}, so the projections would not train in {self.trainer.max_steps} "
                "updates: lower it"
            )
        return self
