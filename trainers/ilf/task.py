"""The task that trains ILF: what is recorded first, what one update does, what is exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoints.manifest import describe, fingerprint
from data.inputs import held_out_inputs, training_inputs
from data.stepped import derive_seed
from data.trajectories import Trajectories, record_trajectories
from modules.guards import sampler_entry
from modules.ilf import ILFConfig, ILFHandle, ILFModule, attach_module, centred_span, module_entry
from modules.pipelines import Conditions, DiffusionDriver, driver, load_pipeline
from modules.sites import block_stack
from modules.solvers import SolverTable
from trainers.adapters import write_task_adapter
from trainers.base import FrozenBackboneTask
from trainers.devices import training_device
from trainers.ilf import schedule
from trainers.ilf.rollout import Learned, Rollout, SolverRows
from trainers.ilf.targets import fad_target, trajectory_target
from trainers.image_quality import psnr_db
from trainers.noise_form import NoisePredictor, image_weights
from trainers.schemas.ilf import Recipe

TEACHER_STEPS = 20  # of the sampler that the sample grids and reports take as the un-accelerated one
SEARCH_RUNS = 96


class ILFTask(FrozenBackboneTask):
    """Frozen pipeline, learned loop (and solver rows).

    Attributes:
        running: the driver of the pipeline.  loop: the handle through which the learned part acts while training.
        runs: recorded trajectories, or None when latents of an image set are learned from.
    """

    learned: Learned

    def __init__(
        self,
        recipe: Recipe,
        running: DiffusionDriver,
        learned: Learned,
        runs: Trajectories | None,
        clean: Tensor,
        conditions: Conditions,
        rollout: Rollout | None,
    ) -> None:
        origin = "random" if recipe.module.init == "scratch" else f"block {learned.loop.config.span_end}"
        copied = {} if recipe.module.init == "scratch" else {"loop": f"transformer_{origin}".replace(" ", "s.")}
        super().__init__(running.transformer, learned, recipe, copied)
        self.settings, self.running, self.runs, self.rollout = recipe, running, runs, rollout
        self.may_leave_unused = not any(learned.loop.config.feedback)  # the solver alone learns then
        self.clean, self.conditions = clean, conditions
        self.noise = NoisePredictor(running)
        self.loop: ILFHandle = attach_module(running.transformer, self.learned.loop)
        self._weights = self._step_weights()
        # Taken while this process holds the whole backbone, which a strategy may shard.
        self.identity = (fingerprint(running.transformer), describe(running.transformer))
        self._judge: tuple[list[Any], list[int], Tensor] | None = None

    def _step_weights(self) -> list[float]:
        config, objective = self.learned.loop.config, self.settings.objective
        if objective.weighting == "image":
            return image_weights(self.noise, config.timesteps)
        if objective.weighting == "final":
            return [0.1] * (len(config.timesteps) - 1) + [1.0]
        return [1.0] * len(config.timesteps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The feedback block, its strengths, and the solver's rows, each with a learning rate of its own."""
        rate, objective = self.settings.optimizer.lr, self.settings.objective
        loop = self.learned.loop
        block = [value for name, value in loop.named_parameters() if name != "scale"]
        groups: list[dict[str, Any]] = [
            {"params": block},
            {"params": [loop.scale], "lr": rate * objective.scale_lr, "weight_decay": 0.0},
        ]
        if hasattr(self.learned, "rows"):
            rows = list(self.learned.rows.parameters())
            groups.append({"params": rows, "lr": rate * objective.solver_lr, "weight_decay": 0.0})
        return groups

    def train_dataloader(self) -> DataLoader[Any]:
        """Sample numbers; what they stand for is held in memory."""
        return self.stepped_loader(lambda index: index, len(self.clean), self.settings.data.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One update's loss: along the student's own trajectory, or on one looped step."""
        index = batch.to(self.clean.device)
        if self.rollout is not None:
            return self._rollout_loss(self.rollout, index)
        return self._single_step_loss(index)

    def _rollout_loss(self, rollout: Rollout, index: Tensor) -> Tensor:
        unroll = min(self.settings.objective.unroll or rollout.steps, rollout.steps)
        start = self.draw_together(rollout.steps - unroll + 1, "first step")
        weights = torch.tensor(self._weights, device=index.device)
        loss, errors = rollout.loss(self.learned, self.loop, index, start, unroll, weights)
        self.note(final_mse=errors[-1], **self._strength())
        return loss

    def _single_step_loss(self, index: Tensor) -> Tensor:
        objective, config = self.settings.objective, self.learned.loop.config
        clean, conditions = self.clean[index], self.conditions.select(index)
        dropped = torch.rand(len(index), device=clean.device) < self.settings.data.drop_condition
        conditions, noise = conditions.drop(dropped), torch.randn_like(clean)
        looping = [i for i, loops in enumerate(config.feedback) if loops]
        step = looping[self.draw_together(len(looping), "step")]
        guidance = config.guidance if objective.guided else 1.0
        if objective.target == "fad":
            timestep = int(torch.randint(1, len(self.noise.alphas), ()))
            with self.loop.bypassed():
                wanted = fad_target(self.noise, clean, noise, timestep, conditions)
            guidance, weight = 1.0, 1.0
        else:
            timestep, following = config.timesteps[step], [*config.timesteps[1:], -1][step]
            noisy = self.noise.add_noise(clean, noise, timestep)
            with self.loop.bypassed():
                wanted = trajectory_target(
                    self.noise, noisy, timestep, following, conditions, objective.substeps, guidance
                )
            weight = self._weights[step]
        self.loop.clock.pin(step)
        noisy = self.noise.add_noise(clean, noise, timestep)
        predicted = self.noise(noisy, timestep, conditions, guidance)
        distilled = (predicted - wanted).square().mean()
        loss = objective.lambda_distill * weight * distilled
        if objective.lambda_denoise:
            loss = loss + objective.lambda_denoise * (predicted - noise).square().mean()
        self.note(**{f"loss_step_{step}": distilled, **self._strength()})
        return loss

    def _strength(self) -> dict[str, Tensor]:
        return {} if self.loop.strengths is None else {"strength": self.loop.strengths.abs().mean()}

    # Sampling and export.

    def config_now(self) -> ILFConfig:
        """The module's config with the solver's present numbers."""
        loop, rows = cast(Learned, self.exported).loop, getattr(self.exported, "rows", None)
        entry = module_entry(loop.config)
        if rows is not None:
            entry["solver"] = module_entry(rows.table())
        return ILFConfig(**entry)

    def runs_past_hooks(self) -> Sequence[nn.Module]:
        """The span, whose second pass goes around what others hooked to it; and the first block, whose time embedding
        diffusers' DiT calls from outside the block."""
        return [block_stack(self.running.transformer).blocks[0], *self.loop.span]

    @contextmanager
    def sampling(self) -> Iterator[ILFHandle]:
        """The pipeline as a user of the exported adapter has it."""
        with self.consolidated():
            module = copy.deepcopy(cast(Learned, self.exported).loop)
            module.config = self.config_now()
        self.loop.detach()
        handle = ILFHandle(self.running.pipe, module.to(self.device, self.running.dtype).requires_grad_(False).eval())
        handle.use_sampler()
        try:
            yield handle
        finally:
            handle.detach()
            self.loop = attach_module(self.backbone, self.learned.loop)

    def _judged_by(self) -> tuple[list[Any], list[int], Tensor]:
        """Held-out inputs and seeds, and the reference images from the same noise; made once."""
        if self._judge is None:
            count, name = max(1, self.settings.data.holdout), self.settings.backbone.name
            inputs = held_out_inputs(name, self.settings.data.prompts, self.settings.seed + 1, count)
            seeds = [derive_seed(self.settings.seed, "held out", i) for i in range(count)]
            self._judge = (inputs, seeds, self._plain(inputs, seeds, self.settings.objective.reference_steps))
        return self._judge

    def _plain(self, inputs: list[Any], seeds: list[int], steps: int) -> Tensor:
        call = {"num_inference_steps": steps, "guidance_scale": self.settings.module.guidance}
        with self.loop.bypassed():
            self.loop.clock.pin(0)
            return self.running.generate(inputs, seeds, **call)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `sample_every` updates: PSNR of the student on held-out inputs."""
        every = self.settings.trainer.sample_every
        if every and self.steps_done % every == 0 and self.settings.data.holdout:
            inputs, seeds, reference = self._judged_by()
            with self.sampling() as handle:
                images = self.running.generate(inputs, seeds, **handle.call_kwargs)
            self.note(held_out_psnr_db=torch.tensor(psnr_db(images, reference)))

    def sample_images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """(20-step teacher's, student's) images from the same noise."""
        inputs, seeds, _ = self._judged_by()
        inputs, seeds = inputs[:count], seeds[:count]
        teacher = self._plain(inputs, seeds, TEACHER_STEPS)
        with self.sampling() as handle:
            return teacher, self.running.generate(inputs, seeds, **handle.call_kwargs)

    def adapter_target(self) -> Any:
        """The pipeline, without the handle of training."""
        self.loop.detach()
        return self.running.pipe

    def export_adapter(self, folder: Path) -> None:
        """The loop's tensors in the backbone's dtype; the solver's numbers are part of the manifest."""
        config = self.config_now()
        tensors = {
            name: value.detach().to("cpu", self.running.dtype).contiguous()
            for name, value in cast(Learned, self.exported).loop.state_dict().items()
        }
        dtypes = {"dtype": [self.settings.backbone.dtype]}
        write_task_adapter(self, folder, module_entry(config), tensors, valid_for=dtypes, call=config.call)


def build_task(recipe: Recipe) -> ILFTask:
    """Loads the backbone, records its trajectories, chooses the schedule, fits the solver, and makes the module.

    Raises:
        ValueError: the recipe does not fit the backbone.
    """
    pipe = load_pipeline(recipe.backbone.name, recipe.backbone.revision, recipe.backbone.dtype)
    running = driver(pipe.to(training_device(recipe)), recipe.backbone.name)
    settings = recipe.module
    positions, runs = None, None
    if recipe.data.kind == "synthetic":
        positions, runs = _record(recipe, running)
        clean, conditions = runs.at(len(runs.timesteps)), runs.conditions
    else:
        from data.images import image_latents

        clean, conditions = image_latents(running, str(recipe.data.path), recipe.data.trajectories)
    table = _table(recipe, running, runs, positions)
    depth = len(block_stack(running.transformer))
    start = centred_span(depth, settings.span_len) if settings.span_start is None else settings.span_start
    own = schedule.own_timesteps(running.pipe.scheduler, settings.steps)
    config = ILFConfig(
        span_start=start,
        span_len=settings.span_len,
        feedback=schedule.looping_steps(settings.feedback_steps, settings.steps),
        timesteps=own if table is None else table.timesteps,
        guidance=settings.guidance,
        inner_timestep=settings.inner_timestep,
        scale_shape=settings.scale_shape,
        feedback_output=settings.feedback_output,
        solver=None if table is None else module_entry(table),
        sampler=sampler_entry(running.pipe.scheduler, table is None),
        call=running.call,
    )
    loop = ILFModule(config, running.transformer, settings.init)
    learned = Learned(loop, SolverRows(table) if table is not None and settings.solver == "learned" else None)
    rollout = None
    if recipe.objective.rollout and runs is not None and positions is not None and table is not None:
        rollout = Rollout(running, runs.thinned([*positions, len(runs.timesteps)]), positions, table, config.guidance)
    return ILFTask(recipe, running, learned, runs, clean, conditions, rollout)


def _record(recipe: Recipe, running: DiffusionDriver) -> tuple[list[int], Trajectories]:
    """The outer steps' positions on the reference grid, and the training trajectories that hold them."""
    settings, data = recipe.module, recipe.data
    name, seed, reference = recipe.backbone.name, recipe.seed, recipe.objective.reference_steps
    inputs = training_inputs(name, data.prompts, seed, data.trajectories)
    seeds = [derive_seed(seed, "trajectory", i) for i in range(len(inputs))]
    shared: dict[str, Any] = {"steps": reference, "guidance": settings.guidance}
    searched = SEARCH_RUNS if settings.timesteps == "searched" else 0
    first = record_trajectories(running, inputs[:searched], seeds[:searched], **shared) if searched else None
    grid = first.timesteps if first else schedule.own_timesteps(running.pipe.scheduler, reference)
    if first is not None:
        positions = schedule.search_positions(running, first, settings.steps, settings.guidance)
    elif settings.timesteps == "uniform":
        positions = schedule.even_positions(settings.steps, reference)
    elif settings.timesteps == "quadratic":
        train_steps = running.pipe.scheduler.config.num_train_timesteps
        positions = schedule.nearest_positions(schedule.quadratic_timesteps(settings.steps, train_steps), grid)
    else:
        positions = schedule.nearest_positions(cast(list[int], settings.timesteps), grid)
    keep = [*positions, reference] if recipe.objective.rollout else [reference]
    rest = record_trajectories(running, inputs[searched:], seeds[searched:], keep=keep, notify=print, **shared)
    return positions, rest if first is None else first.thinned(rest.kept).joined(rest)


def _table(
    recipe: Recipe, running: DiffusionDriver, runs: Trajectories | None, positions: list[int] | None
) -> SolverTable | None:
    """The solver that the adapter brings along; None leaves the pipeline its own."""
    settings = recipe.module
    if settings.solver == "backbone":
        return None
    if runs is not None and positions is not None and settings.solver == "learned":
        return schedule.fit_solver(running, runs, positions, settings.guidance)
    if runs is not None and positions is not None:
        timesteps = [runs.timesteps[position] for position in positions]
    else:
        timesteps = schedule.chosen_timesteps(running.pipe.scheduler, settings.timesteps, settings.steps)
    loops = schedule.looping_steps(settings.feedback_steps, settings.steps)
    if settings.solver == "ddim":
        alone = [True] * settings.steps
    elif recipe.objective.rollout:
        alone = []
    else:
        # A looped step predicts a later point's noise: an order-2 row would mix it with the present one's.
        alone = [loops[i] or (i > 0 and loops[i - 1]) for i in range(settings.steps)]
    return schedule.initial_table(running, timesteps, alone)
