"""The task that trains the router: step-wise denoising training, and Learning-to-Cache on the same table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.inputs import training_inputs
from data.stepped import derive_seed, step_generator
from modules.contracts import Granularity
from modules.diffusion_host import attach_reuse
from modules.harmonica import HarmoniCaConfig, RouterTable, attach_masks, module_entry, predictor_of
from modules.learned_cache import CacheHandle
from modules.pipelines import Conditions, DiffusionDriver
from modules.reuse import EveryN
from modules.solvers import noise_of
from trainers.cache_task import CacheTask, load_driver, own_runs, sampling_of
from trainers.harmonica.credit import CreditedCache
from trainers.harmonica.lambdas import analytic_lambdas, paper_lambdas, relative_lambdas, telescoping_lambdas
from trainers.harmonica.refit import Refit
from trainers.harmonica.student import Row, Sampler, SoftCache
from trainers.harmonica.trajectory import Drift, State, Trajectory, output_weights
from trainers.noise_form import NoisePredictor
from trainers.schemas.harmonica import Recipe


class Learned(nn.Module):
    """The table, and what a run that goes on must know besides.

    Buffers: `lambdas` [R], the steps' weights; `beta` [1], and `computed` [1], the share that it was set by; `start`
    and `start_corrections`, the table's rows when the running trajectory began, from which its first steps can be
    walked again.  With `credited`, `credit` [R, N], what scores were worth to later steps of the last trajectory, and
    `earned`, what they are worth to those of the running one so far.
    """

    lambdas: Tensor
    beta: Tensor
    computed: Tensor
    start: Tensor
    start_corrections: Tensor
    credit: Tensor
    earned: Tensor

    def __init__(self, router: RouterTable, beta: float, credited: bool = False) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("lambdas", torch.ones(len(router.logits)))
        self.register_buffer("beta", torch.tensor([beta]))
        self.register_buffer("computed", torch.zeros(1))
        self.register_buffer("start", torch.stack([row.detach() for row in router.logits]))
        if len(router.corrections):
            self.register_buffer("start_corrections", torch.stack([row.detach() for row in router.corrections]))
        if credited:
            self.register_buffer("credit", torch.zeros_like(self.start))
            self.register_buffer("earned", torch.zeros_like(self.start))

    @torch.no_grad()
    def note_start(self) -> None:
        """A trajectory begins, and its updates have the credit of the last one."""
        self.start.copy_(torch.stack(list(self.router.logits)))
        if len(self.router.corrections):
            self.start_corrections.copy_(torch.stack(list(self.router.corrections)))
        if hasattr(self, "credit"):
            self.credit.copy_(self.earned)
            self.earned.zero_()

    def row_at_start(self, step: int) -> Row | None:
        """A step's row as it was when the trajectory began, which is what the trajectory meets: it is updated there."""
        if step not in self.router.config.routed:
            return None
        row = self.router.config.routed.index(step)
        return self.start[row].sigmoid(), self.start_corrections[row] if len(self.router.corrections) else None

    def row(self, step: int) -> Row | None:
        """A step's present row without gradient; None computes everything."""
        if step not in self.router.config.routed:
            return None
        scores, corrections = self.router(step)
        return scores.detach(), None if corrections is None else corrections.detach()


class HarmoniCaTask(CacheTask):
    """Frozen pipeline, learned router.

    One update is one step of a trajectory.  Nothing of a step but detached latents and caches outlives its update, so
    memory does not grow with the number of steps.
    """

    learned: Learned
    may_leave_unused = True  # an update is one row's

    def __init__(
        self,
        recipe: Recipe,
        running: DiffusionDriver,
        learned: Learned,
        conditions: Conditions,
        clean: Tensor | None = None,
        refit: Refit | None = None,
    ) -> None:
        config = learned.router.config
        super().__init__(recipe, running, learned, config.sampling, recipe.data.prompts)
        self.settings, self.pool, self.clean, self.refit = recipe, conditions, clean, refit
        self.config = config
        self._attach()
        self._running: Trajectory | None = None
        self._reusing: CreditedCache | None = None

    @cached_property
    def noise(self) -> NoisePredictor:
        """The noise form of the backbone's predictions, which Learning-to-Cache and `analytic` work with.

        Raises:
            ValueError: the sampler is a flow, which has none.
        """
        return NoisePredictor(self.running)

    @cached_property
    def drift(self) -> Drift:
        """How drift is told."""
        return Drift(output_weights(self.sampler.scheduler), self.settings.objective.drift_power)

    def _attach(self) -> None:
        predictor = predictor_of("hold")()  # never asked while training: the student stands before it
        self.reuse = attach_reuse(self.running.transformer, EveryN(1), predictor, self.config.granularity)
        self.sampler = Sampler(self.running, self.reuse, self.config)
        self._attached = True

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """See `CacheTask`; may be nested."""
        if not self._attached:
            yield
            return
        self.reuse.detach()
        self._attached = False
        try:
            yield
        finally:
            self._attach()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The logits, and the forecast's corrections with a learning rate of their own."""
        router, settings = self.learned.router, self.settings
        groups: list[dict[str, Any]] = [{"params": list(router.logits)}]
        if len(router.corrections):
            rate = settings.optimizer.lr * settings.objective.forecast_lr
            groups.append({"params": list(router.corrections), "lr": rate})
        return groups

    def train_dataloader(self) -> DataLoader[Any]:
        """Numbers of the pool's conditions; a trajectory draws its own, since it takes many updates."""
        return self.stepped_loader(lambda index: index, len(self.pool), self.settings.data.batch_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One update's loss, which reaches one row of the table."""
        number, position = divmod(self.batch_number, len(self.config.routed))
        if position == 0:
            self._follow_budget(number)
        if self.batch_number % self.settings.objective.refresh == 0:
            self._refresh(number)
        if self.clean is not None:
            return self._noised_loss(batch.to(self.running.device), self.clean)
        if self._running is None or (self._running.number, self._running.student.step) != (
            number,
            self.config.routed[position],
        ):
            if position == 0:
                self.learned.note_start()
            self._running = self._begun(number, self.config.routed[position])
        return self._trajectory_loss(self._running)

    # Step-wise denoising training.

    @torch.no_grad()
    def _begun(self, number: int, until: int) -> Trajectory:
        """A trajectory before step `until`: its first steps are computed, or walked again after a run was resumed."""
        latents, conditions = self._drawn(self.settings.data.batch_size, "trajectory", number, self.global_rank)
        scheduler, objective = self.sampler.scheduler(), self.settings.objective
        student = State(latents * scheduler.init_noise_sigma, scheduler)
        full = State(student.latents, self.sampler.scheduler()) if objective.drift else None
        soft = (CreditedCache if objective.credit else SoftCache)(self.config)
        at = Trajectory(number, student, conditions, soft, full)
        for step in range(until):
            row = self.learned.row_at_start(step)
            soft.set_row(row)
            output = self._output(student, conditions, soft)
            if full is not None:
                full.advance(output if step == 0 else self._output(full, conditions, None))
            student.advance(output)
        return at

    def _output(self, state: State, conditions: Conditions, soft: SoftCache | None) -> Tensor:
        return self.sampler.output(state.latents, state.step, state.scheduler, conditions, soft)

    def _drawn(self, count: int, *what: int | str) -> tuple[Tensor, Conditions]:
        """Noise and conditions that are a function of the seed and `what`."""
        generator = step_generator(self.settings.seed, "conditions", *what)
        index = torch.randint(len(self.pool), (count,), generator=generator).to(self.running.device)
        seeds = [derive_seed(self.settings.seed, "noise", *what, i) for i in range(count)]
        return self.running.initial_noise(seeds).float(), self.pool.select(index)

    def _trajectory_loss(self, at: Trajectory) -> Tensor:
        step = at.student.step
        with torch.no_grad():
            wanted = self._output(at.teacher, at.conditions, None)
        row = self.learned.router(step)
        at.soft.set_row(row)
        output = self._output(at.student, at.conditions, at.soft)
        at.soft.set_row(None)  # which has a graph, and would outlive the update
        at.student.advance(output)
        if at.full is None:
            error = (output - wanted).square().mean()
        else:
            at.full.advance(wanted)
            error = self.drift(at, output, step)
        loss = self._loss(step, row[0], error)
        if isinstance(at.soft, CreditedCache):
            loss = loss + (self.learned.credit[self.config.routed.index(step)] * row[0]).sum()
            self._reusing = at.soft
        if step == len(self.config.timesteps) - 1:
            self._running = None
        return loss

    def on_after_backward(self) -> None:
        """What earlier steps' scores did for this one is credited to them in their own next updates."""
        super().on_after_backward()
        if self._reusing is None:
            return
        found, (worths, self._reusing) = torch.zeros_like(self.learned.earned), (self._reusing.worths(), None)
        for step, unit, worth in worths:
            found[self.config.routed.index(step), unit] += worth
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(found)
        self.learned.earned += found / self.trainer.world_size

    def _loss(self, step: int, scores: Tensor, error: Tensor) -> Tensor:
        beta = self.learned.beta[0]
        loss = self.learned.lambdas[self.config.routed.index(step)] * error + beta * scores.sum()
        if self.steps_done >= 0.8 * self.settings.trainer.max_steps:
            loss = loss + self.settings.objective.polarize * beta * (scores * (1 - scores)).sum()
        self.note(error=error)
        return loss

    # Learning-to-Cache.

    def _noised_loss(self, index: Tensor, clean: Tensor) -> Tensor:
        """A routed step on noised samples; the step before is computed in full and fills the cache."""
        step = self.config.routed[self.draw_together(len(self.config.routed), "step")]
        before, here = self.config.timesteps[step - 1], self.config.timesteps[step]
        dropped = torch.rand(len(index), device=index.device) < self.settings.data.drop_condition
        conditions, scheduler = self.pool.select(index).drop(dropped), self.sampler.scheduler()
        guided, soft = self.sampler.unguided(), SoftCache(self.config)
        with torch.no_grad():
            latents = self.noise.add_noise(clean[index], torch.randn_like(clean[index]), before)
            soft.set_row(None)
            output = guided.output(latents, step - 1, scheduler, conditions, soft)
            noise = noise_of(output, latents, self.noise.alphas[before], self.noise.prediction_type)
            latents = self.noise.ddim(latents, noise, before, here)
            wanted = guided.output(latents, step, scheduler, conditions, None)
        row = self.learned.router(step)
        soft.set_row(row)
        output = guided.output(latents, step, scheduler, conditions, soft)
        return self._loss(step, row[0], (output - wanted).square().mean())

    # What changes between trajectories.

    @torch.no_grad()
    def _follow_budget(self, number: int) -> None:
        """Dual ascent: beta rises while more is computed than asked for, and less the faster that falls already."""
        compute = float(self.learned.router.mask().float().mean())
        objective = self.settings.objective
        if objective.target_compute is not None and number:
            excess, change = compute - self._asked(objective.target_compute, compute), compute - self.learned.computed
            if excess:
                self.learned.beta *= math.exp(objective.beta_rate * (excess + objective.beta_damping * float(change)))
        self.learned.computed.fill_(compute)
        self.note(compute=torch.tensor(compute), beta=self.learned.beta[0])

    def _asked(self, target: float, compute: float) -> float:
        """The share that beta is to reach now: the nearest to `compute` that is asked for.

        In the first `anneal` of training that is anything from the target up to a bound that falls from 1 to it: scores
        that fall by themselves, because their units are worth nothing, must not drive beta down.
        """
        until = self.settings.objective.anneal * self.settings.trainer.max_steps
        most = target if self.steps_done >= until else 1 - (1 - target) * self.steps_done / until
        return min(max(compute, target), most)

    @torch.no_grad()
    def _refresh(self, number: int) -> None:
        """Estimates the steps' weights anew, on every rank from the same noise."""
        mode, routed = self.settings.objective.lambda_mode, self.config.routed
        if mode == "none":
            return
        if mode == "analytic":
            found = analytic_lambdas(self.noise, self.config.timesteps, routed)
        else:
            latents, conditions = self._drawn(self.settings.objective.lambda_batch, "weights", number)
            latents = latents * self.sampler.scheduler().init_noise_sigma
            final, table = partial(self.sampler.final, latents, conditions), self.learned.row
            if mode == "relative":
                found = relative_lambdas(final, self.sampler.errors(latents, conditions, table), table, routed)
            else:
                found = (paper_lambdas if mode == "paper" else telescoping_lambdas)(final, table, routed)
        if self.settings.objective.lambda_mean and (mean := float(found.mean())):
            found = found * (self.settings.objective.lambda_mean / mean)
        self.learned.lambdas.copy_(found)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One update; logits stay within bounds."""
        super().optimizer_step(*args, **kwargs)
        self.learned.router.clamp_()

    # Export.

    def masks(self) -> Tensor:
        """What each operating point computes, bool [P, T, N]."""
        router, target = cast(Learned, self.exported).router, self.settings.objective.target_compute
        first = router.mask() if target is None else router.mask_at(target)
        return torch.stack([first, *(router.mask_at(share) for share in self.settings.module.compute)])

    def points(self) -> tuple[Tensor, Tensor | None]:
        """What is exported: masks (fitted anew where the recipe says so), and the forecast's weights [P, T, N, W]."""
        router, masks = cast(Learned, self.exported).router, self.masks()
        if self.refit is not None:
            with self.without_hooks():
                return self.refit(masks)
        if self.config.reuse_op != "linear":
            return masks, None
        return masks, torch.stack([router.forecast_weights(mask) for mask in masks])

    def attach_exported(self) -> CacheHandle:
        """See `CacheTask`."""
        return attach_masks(self.running.pipe, self.config, *self.points())

    def adapter_target(self) -> Any:
        """The pipeline, without the hooks of training."""
        self.reuse.detach()
        return self.running.pipe

    def module_entry_now(self) -> dict[str, Any]:
        """See `CacheTask`."""
        return module_entry(self.config)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The logits, what each operating point computes, and the forecast's weights there."""
        router, (masks, weights) = cast(Learned, self.exported).router, self.points()
        tensors = {"router.logits": torch.stack([row.detach().cpu() for row in router.logits]), "router.masks": masks}
        if weights is not None:
            tensors["forecast.weights"] = weights
        return tensors


def build_task(recipe: Recipe) -> HarmoniCaTask:
    """Loads the backbone, encodes what is asked for (or records samples), and makes the table.

    Raises:
        ValueError: the recipe does not fit the backbone.
    """
    running, settings, data = load_driver(recipe), recipe.module, recipe.data
    sampling = sampling_of(running, settings.steps, settings.guidance)
    granularity: Granularity = settings.granularity
    with attach_reuse(running.transformer, EveryN(1), predictor_of("hold")(), granularity) as probe:
        units = list(probe.unit_names)
    noised = recipe.objective.kind == "l2c"
    if noised or recipe.objective.lambda_mode == "analytic":
        NoisePredictor(running)  # refuses a flow before anything is recorded
    config = HarmoniCaConfig(
        units=units,
        routed=list(range(1, settings.steps, 2 if noised else 1)),
        timesteps=sampling.timesteps,
        guidance=sampling.guidance,
        granularity=granularity,
        reuse_op=settings.reuse_op,
        history=settings.history,
        tau=settings.tau,
        sampler=sampling.sampler,
        call=sampling.call,
    )
    if noised:
        runs = own_runs(recipe, running, data.prompts, data.inputs, sampling, keep=[settings.steps])
        pool, clean = runs.conditions, runs.at(settings.steps)
    else:
        inputs = training_inputs(recipe.backbone.name, data.prompts, recipe.seed, data.inputs)
        pool, clean = running.encode(inputs), None
    refit = None
    if recipe.objective.refit:
        runs = own_runs(recipe, running, data.prompts, data.recorded, sampling)
        refit = Refit(running, runs, config, recipe.objective.ridge, data.searched, recipe.objective.polish)
    learned = Learned(RouterTable(config), recipe.objective.beta, recipe.objective.credit)
    return HarmoniCaTask(recipe, running, learned, pool, clean, refit)
