"""What an ILF recipe may say (docs/methods/ilf.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import RecipeBase, Section


class Module(Section):
    """The feedback block, the span it is fed back over, and the sampler schedule it is made for."""

    span_start: int | None = Field(
        default=None, ge=0, description="first block of the looped span; null centres the span"
    )
    span_len: PositiveInt = Field(default=4, description="blocks in the looped span")
    steps: PositiveInt = Field(default=10, description="outer sampler steps")
    feedback_steps: list[int] | int | Literal["all", "none"] = Field(
        default=4, description="sampler steps that use feedback: a list of indices, how many, all, or none"
    )
    inner_timestep: Literal["outer", "target"] = Field(
        default="outer",
        description="timestep of the second pass: that of the step (identity at start) or the one it aims at",
    )
    scale_shape: Literal["scalar", "per_step", "channel"] = Field(
        default="scalar",
        description="strengths per injection: one, one for each looped step, or one for each looped step and channel",
    )
    feedback_output: Literal["full", "delta"] = Field(
        default="full", description="what the feedback block feeds back: its output, or its output less its input"
    )
    init: Literal["copy", "scratch"] = Field(
        default="copy", description="initial feedback block: a copy of the span's last block, or random"
    )
    solver: Literal["backbone", "ddim", "dpm", "learned"] = Field(
        default="backbone",
        description="the pipeline's own scheduler, or one that the adapter brings: DDIM, DPM-Solver++(2M), or one "
        "whose multistep weights are learned along with the loop",
    )
    guidance: float = Field(
        default=3.0, ge=1, description="classifier-free guidance the adapter is made for; 1 is without"
    )
    timesteps: list[int] | Literal["uniform", "quadratic", "searched"] = Field(
        default="uniform",
        description="the outer timesteps, or how they are spaced: evenly, as the paper's feedback-aware schedule, or "
        "where a fitted solver does best; anything but uniform needs a solver of the adapter's own",
    )

    @model_validator(mode="after")
    def _steps_agree(self) -> Module:
        if isinstance(self.timesteps, list):
            if len(self.timesteps) != self.steps:
                raise ValueError(f"timesteps lists {len(self.timesteps)} steps but steps is {self.steps}")
            if any(later >= earlier for earlier, later in zip(self.timesteps, self.timesteps[1:], strict=False)):
                raise ValueError("timesteps must fall from the noisiest to the cleanest")
        if self.solver == "backbone" and self.timesteps != "uniform":
            raise ValueError("timesteps must be uniform with solver backbone, which has its own: set solver=dpm")
        if self.solver != "learned" and self.timesteps == "searched":
            raise ValueError("timesteps searched needs solver learned: the search fits one")
        chosen = self.feedback_steps
        if isinstance(chosen, int) and not 0 <= chosen <= self.steps:
            raise ValueError(f"feedback_steps is {chosen} but must lie between 0 and steps, {self.steps}")
        if isinstance(chosen, list) and (wrong := [i for i in chosen if not 0 <= i < self.steps]):
            raise ValueError(f"feedback_steps names step {wrong[0]} but the steps are 0 to {self.steps - 1}")
        return self


class Data(Section):
    """What the module learns from."""

    kind: Literal["synthetic", "latents"] = Field(
        default="synthetic", description="trajectories of the backbone's own sampler, or latents of an image set"
    )
    path: str | None = Field(default=None, description="folder of the latents; needed by kind latents")
    prompts: str | None = Field(default=None, description="text file, one prompt a line; null takes the backbone's own")
    trajectories: PositiveInt = Field(default=512, description="recorded trajectories to train on")
    holdout: int = Field(default=64, ge=0, description="further trajectories kept for validation")
    batch_size: PositiveInt = Field(default=16, description="samples per update and device")
    drop_condition: float = Field(default=0.1, ge=0, le=1, description="share of samples that lose their condition")

    @model_validator(mode="after")
    def _latents_have_a_path(self) -> Data:
        if self.kind == "latents" and self.path is None:
            raise ValueError("kind is latents, which needs path: the folder of the latents")
        return self


class Objective(Section):
    """What the module is asked to reproduce."""

    target: Literal["trajectory", "fad"] = Field(
        default="trajectory",
        description="where the teacher's smaller steps land, or the teacher's noise at half the timestep",
    )
    substeps: PositiveInt = Field(default=3, description="teacher steps inside one outer step")
    guided: bool = Field(default=True, description="the teacher's steps are guided")
    weighting: Literal["uniform", "image", "final"] = Field(
        default="uniform",
        description="weight of each step: equal, by its effect on the final image, or nearly all on the last (rollout)",
    )
    rollout: bool = Field(
        default=False, description="train on the student's own trajectories against recorded ones, through the solver"
    )
    unroll: int = Field(
        default=0, ge=0, description="consecutive steps of a rollout that the gradient runs through; 0 is all of them"
    )
    reference_steps: PositiveInt = Field(default=50, description="sampler steps of the recorded trajectories")
    scale_lr: float = Field(default=5.0, gt=0, description="learning rate of the strengths, times optimizer.lr")
    solver_lr: float = Field(default=0.1, gt=0, description="learning rate of the solver's weights, times optimizer.lr")
    lambda_distill: float = Field(default=1.0, ge=0, description="weight of the distillation loss")
    lambda_denoise: float = Field(default=0.0, ge=0, description="weight of the denoising loss (target fad)")


class Recipe(RecipeBase):
    """Inner Loop Feedback (arXiv:2501.13107)."""

    method: Literal["ilf"] = Field(default="ilf", description="Inner Loop Feedback")
    module: Module = Field(default_factory=Module, description="feedback block, span and sampler schedule")
    data: Data = Field(default_factory=Data, description="what it learns from")
    objective: Objective = Field(default_factory=Objective, description="what it is asked to reproduce")

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        rollout = self.objective.rollout
        if rollout and (self.data.kind != "synthetic" or self.module.solver == "backbone"):
            raise ValueError("objective.rollout needs data.kind synthetic and module.solver ddim, dpm or learned")
        if self.module.solver == "learned" and not rollout:
            raise ValueError("module.solver learned needs objective.rollout: its weights learn along the trajectory")
        if rollout and self.objective.target == "fad":
            raise ValueError("objective.rollout follows recorded trajectories: set objective.target to trajectory")
        if self.objective.target == "fad" and self.module.inner_timestep == "target":
            raise ValueError("objective.target fad draws its own timesteps: set module.inner_timestep to outer")
        if self.module.steps > self.objective.reference_steps:
            raise ValueError(f"module.steps is {self.module.steps}, more than objective.reference_steps")
        if self.evaluation.prompts is None:
            self.evaluation.prompts = self.data.prompts
        if not rollout and self.module.feedback_steps in ("none", 0, []):
            raise ValueError("module.feedback_steps is none: there is nothing to learn without a looped step")
        return self
