"""What a HarmoniCa recipe may say (docs/methods/harmonica.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import RecipeBase, Section


class Module(Section):
    """The router table, what it routes, and what stands in for what is not computed."""

    steps: PositiveInt = Field(default=20, description="sampler steps")
    guidance: float = Field(default=3.0, ge=1, description="classifier-free guidance it is made for; 1 is without")
    granularity: Literal["submodule", "block", "model"] = Field(
        default="submodule", description="what is routed: attention and feed-forward outputs, blocks, or whole steps"
    )
    reuse_op: Literal["hold", "taylor1", "taylor2", "linear"] = Field(
        default="hold",
        description="what a reused unit returns: its last output (the paper), an extrapolation, or a learned forecast",
    )
    history: PositiveInt = Field(default=3, description="values that the learned forecast looks back on")
    tau: float = Field(default=0.1, gt=0, lt=1, description="units with a higher score are computed")
    compute: list[float] = Field(
        default=[], description="further operating points: shares of units that are computed, the highest scores first"
    )


class Data(Section):
    """What trajectories, or noised samples, begin with."""

    prompts: str | None = Field(default=None, description="text file, one prompt a line; null takes the backbone's own")
    inputs: PositiveInt = Field(default=256, description="prompts or labels that are drawn from; l2c: recorded samples")
    batch_size: PositiveInt = Field(default=8, description="images per trajectory and device")
    recorded: int = Field(default=192, ge=4, description="objective.refit: full runs that the forecast is fitted on")
    searched: int = Field(default=64, ge=4, description="objective.polish: of them, those that are searched on")
    drop_condition: float = Field(default=0.1, ge=0, le=1, description="l2c: share of samples without condition")


class Objective(Section):
    """What the router is asked for."""

    kind: Literal["sdt", "l2c"] = Field(
        default="sdt",
        description="step-wise denoising training along whole trajectories, or Learning-to-Cache on noised samples, "
        "where every second step is routed",
    )
    lambda_mode: Literal["paper", "relative", "telescoping", "analytic", "none"] = Field(
        default="paper",
        description="weight of each step's error: its effect on the final image if that step alone computes all (the "
        "paper), that over the error itself, as rows are switched on one after the other (the paper's code), by the "
        "sampler's formula, or 1",
    )
    refresh: PositiveInt = Field(default=500, description="updates between two estimates of the weights")
    lambda_batch: PositiveInt = Field(default=8, description="images that the weights are estimated from")
    lambda_mean: float = Field(
        default=0.0,
        ge=0,
        description="what the weights are scaled to on average, so that beta does not have to follow their size, which "
        "falls by orders of magnitude as the table improves; 0 leaves them as estimated",
    )
    drift: bool = Field(
        default=False,
        description="ask each step for the full model's own next latents, from the same noise, instead of what it says "
        "about the student's: errors that point the same way at every step count as what they add up to",
    )
    drift_power: float = Field(
        default=0.0,
        ge=0,
        description="drift: told in units of the step's prediction at 0, so that a step that moves the latents by "
        "little, as early ones do, weighs as much as others, and in those of the latents at 2",
    )
    credit: bool = Field(
        default=False,
        description="let a computed unit's score also answer for what later steps reuse of it, which is added to the "
        "loss of its next update; reuse_op hold, sub-modules or whole steps",
    )
    beta: float = Field(default=7e-8, ge=0, description="price of a computed unit")
    target_compute: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of units to compute: beta follows it, and the adapter's first operating point has it; null "
        "leaves beta alone and lets tau decide",
    )
    beta_rate: float = Field(
        default=0.5, gt=0, description="how fast beta follows: beta *= exp(rate * excess) per trajectory, damped"
    )
    beta_damping: float = Field(
        default=20.0,
        ge=0,
        description="trajectories that a change of the share is looked ahead by: without, scores, which move by steps "
        "of fixed size, overshoot by half of the table",
    )
    anneal: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="part of training in which the most that may be computed falls from 1 to target_compute, so that "
        "what matters least is given up first; 0 asks for the target at once",
    )
    polarize: float = Field(
        default=0.0, ge=0, description="weight of sum r (1 - r) in the last fifth of training, times beta"
    )
    refit: bool = Field(
        default=False,
        description="whole steps with reuse_op linear: fit the forecast anew, in closed form on the student's own "
        "states, to the steps that the router chose",
    )
    polish: int = Field(
        default=0,
        ge=0,
        description="refit: sweeps in which the router's steps may still move by one or two; in the first one late "
        "steps move too, and what ended nearer goes on",
    )
    ridge: float = Field(default=1e-7, gt=0, description="refit: pull towards first-order Taylor")
    forecast_lr: float = Field(
        default=0.1, gt=0, description="learning rate of the learned forecast, times optimizer.lr"
    )


class Recipe(RecipeBase):
    """HarmoniCa (arXiv:2410.01723), and Learning-to-Cache (arXiv:2406.01733)."""

    method: Literal["harmonica"] = Field(default="harmonica", description="learned cache routers")
    module: Module = Field(default_factory=Module, description="router table and reuse")
    data: Data = Field(default_factory=Data, description="what trajectories begin with")
    objective: Objective = Field(default_factory=Objective, description="what the router is asked for")

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        objective, steps = self.objective, self.module.steps
        if self.trainer.strategy.startswith("deepspeed"):
            raise ValueError(
                f"trainer.strategy {self.trainer.strategy} steps all rows of the table in every update, where one row "
                "has a gradient: set it to ddp or fsdp; what learns is a few kilobytes"
            )
        if steps < 2:
            raise ValueError("module.steps is 1: a cache needs a step before the one that reuses")
        shares = [*self.module.compute, *([] if objective.target_compute is None else [objective.target_compute])]
        lowest = (steps - steps // 2) / steps if objective.kind == "l2c" else 1 / steps
        if wrong := [share for share in shares if not lowest - 1e-9 <= share < 1]:
            what = "as steps that are not routed" if objective.kind == "l2c" else "as the first step"
            raise ValueError(f"a share of {wrong[0]:g} must be below 1 and at least {lowest:g}, as much {what}")
        if objective.refit and not (self.module.granularity == "model" and self.module.reuse_op == "linear"):
            raise ValueError("objective.refit needs module.granularity model and module.reuse_op linear")
        if objective.kind == "l2c" and (objective.drift or objective.credit):
            raise ValueError("objective.drift and objective.credit follow a trajectory: leave them out for l2c")
        if objective.credit and (self.module.reuse_op != "hold" or self.module.granularity == "block"):
            raise ValueError(
                "objective.credit knows what a held output is worth: it needs module.reuse_op hold and another "
                "module.granularity than block"
            )
        if objective.credit and self.trainer.precision == "16-mixed":
            raise ValueError(
                "objective.credit reads gradients, which 16-mixed scales: set trainer.precision to bf16-mixed"
            )
        if objective.polish and not objective.refit:
            raise ValueError("objective.polish moves the steps of a forecast that is fitted anew: set objective.refit")
        if self.data.searched > self.data.recorded:
            raise ValueError(f"data.searched is {self.data.searched}, more than data.recorded, {self.data.recorded}")
        if objective.kind == "l2c" and objective.lambda_mode != "none":
            raise ValueError("objective.lambda_mode weighs the steps of a trajectory: set it to none for l2c")
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError("trainer.accumulate_grad_batches must be 1: an update is one step of a trajectory")
        if self.evaluation.prompts is None:
            self.evaluation.prompts = self.data.prompts
        return self
