"""What a forecast recipe may say (docs/methods/forecast.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import RecipeBase, Section


class Module(Section):
    """Which steps are computed, and what the forecast of the others looks at."""

    steps: PositiveInt = Field(default=20, description="sampler steps")
    guidance: float = Field(default=3.0, ge=1, description="classifier-free guidance it is made for; 1 is without")
    compute: list[float] = Field(
        default=[0.5, 0.35, 0.65],
        min_length=1,
        description="operating points as shares of the steps that are computed; the first is the one that is "
        "attached and measured first",
    )
    speedup: float | None = Field(
        default=None,
        gt=1,
        description="ask for a speedup of the whole pipeline on this machine instead: one operating point, "
        "whose share is found by timing",
    )
    computed: list[list[int]] | Literal["even", "searched"] = Field(
        default="searched",
        description="the computed steps of each operating point, or how they are chosen: evenly, or where the "
        "fitted forecast ends nearest to the full run",
    )
    history: PositiveInt = Field(default=3, description="computed steps that a forecast looks back on")

    @model_validator(mode="after")
    def _points_agree(self) -> Module:
        if wrong := [share for share in self.compute if not 1 / self.steps <= share < 1]:
            raise ValueError(f"compute has {wrong[0]:g} but must lie between one of {self.steps} steps and below 1")
        if not isinstance(self.computed, list):
            return self
        if self.speedup is not None:
            raise ValueError("speedup finds a share of its own: set computed to searched or even")
        if len(self.computed) != len(self.compute):
            raise ValueError(f"computed has {len(self.computed)} lists but compute names {len(self.compute)} shares")
        for share, steps in zip(self.compute, self.computed, strict=True):
            if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] >= self.steps:
                raise ValueError(f"computed has {steps}, which must rise from 0 and end before step {self.steps}")
            if len(steps) != max(1, round(share * self.steps)):
                raise ValueError(f"computed has {len(steps)} of {self.steps} steps where compute says {share:g}")
        return self


class Data(Section):
    """What the forecast is fitted on: recorded runs of the backbone's own sampler."""

    prompts: str | None = Field(default=None, description="text file, one prompt a line; null takes the backbone's own")
    trajectories: int = Field(default=128, ge=2, description="recorded runs")
    searched: int = Field(
        default=64, ge=2, description="of them, those that the search of the computed steps runs on, half to judge by"
    )
    batch_size: PositiveInt = Field(default=16, description="runs per update and device")


class Objective(Section):
    """How the weights are found."""

    ridge: float = Field(
        default=1e-7,
        gt=0,
        description="pull of the closed form towards first-order Taylor, relative to the mean energy of what is "
        "weighed; predictions of neighbouring steps are nearly collinear",
    )
    rounds: PositiveInt = Field(default=2, description="sweeps of the search over the computed steps")


class Recipe(RecipeBase):
    """A learned linear forecast of the steps that are not computed."""

    method: Literal["forecast"] = Field(default="forecast", description="learned linear forecast")
    module: Module = Field(default_factory=Module, description="operating points and history")
    data: Data = Field(default_factory=Data, description="recorded runs")
    objective: Objective = Field(default_factory=Objective, description="how the weights are found")

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if self.data.searched > self.data.trajectories:
            raise ValueError(
                f"data.searched is {self.data.searched}, more than data.trajectories, {self.data.trajectories}"
            )
        if self.evaluation.prompts is None:
            self.evaluation.prompts = self.data.prompts
        return self
