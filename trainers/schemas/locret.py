"""What a Locret recipe may say (docs/methods/locret.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import Section
from trainers.context_settings import ContextRecipe


class Module(Section):
    """The retaining heads, and how the cache is cut unless the user says otherwise."""

    hidden_size: PositiveInt = Field(default=256, description="width of a head's inner layer (the paper's: 1024)")
    budget: PositiveInt = Field(default=4096, description="units kept per KV head of every layer")
    chunk: PositiveInt = Field(default=1024, description="tokens of a prompt that are read at a time")
    stabilizers: int = Field(
        default=0, ge=0, description="last tokens of every chunk but the last that stay whatever their scores"
    )
    local: int = Field(default=100, ge=0, description="last tokens of a prompt, which are read after the last eviction")
    positions: Literal["original", "compact"] = Field(
        default="original",
        description="original leaves keys rotated by their places in the text, compact (the paper's) closes the gaps",
    )
    query_aware: bool = Field(
        default=False, description="read the local tokens before everything else too, in training and in use (Locret-Q)"
    )
    decode_every: PositiveInt | None = Field(
        default=None, description="generated tokens after which the cache is cut again; null lets it grow"
    )

    @model_validator(mode="after")
    def _something_can_go(self) -> Module:
        if self.stabilizers >= self.budget:
            raise ValueError(f"stabilizers is {self.stabilizers}, of a budget of {self.budget}: give fewer than that")
        if self.query_aware and not self.local:
            raise ValueError("query_aware reads the local tokens first, and local is 0: say how many a question has")
        return self


class Objective(Section):
    """What the heads are asked to say."""

    smooth_weight: float = Field(
        default=2.5e-3, ge=0, description="of the squared step between neighbours, summed over the layers"
    )
    evicting: bool = Field(
        default=False,
        description="read prompts a second time, in chunks and within module.budget, and learn from the features that "
        "the heads then find; false learns from those of the whole prompt (the paper's)",
    )


class Recipe(ContextRecipe):
    """Locret (arXiv:2410.01805)."""

    method: Literal["locret"] = Field(default="locret", description="Locret")
    module: Module = Field(default_factory=Module, description="the retaining heads and the cache")
    objective: Objective = Field(default_factory=Objective, description="what the heads are asked to say")

    @model_validator(mode="after")
    def _features_are_read_in_one_way(self) -> Recipe:
        if self.objective.evicting and self.module.query_aware:
            raise ValueError("objective.evicting reads prompts without their question in front, and module.query_aware "
                             "wants it there: leave one of them out")  # fmt: skip
        return self
