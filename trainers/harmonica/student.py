"""The student of training: everything is computed, softly blended with what reuse would give, and cached hard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.contracts import Features, Predictor
from modules.diffusion_host import ReuseHandle
from modules.harmonica import HarmoniCaConfig, predictor_of
from modules.linear_forecast import LinearForecast, Weights, taylor_weights
from modules.pipelines import Conditions, DiffusionDriver

Row = tuple[Tensor, Tensor | None]
"""Scores [N] of a step, and the learned forecast's corrections [N, W] or None."""
Table = Callable[[int], Row | None]
"""The rows by step; None computes everything."""


class SoftCache:
    """What stands between units and the rest of the model, see `ReuseHandle.student`.

    A unit gives r * computed + (1 - r) * reused; its slot takes the computed value, without gradient, iff r > tau.
    """

    def __init__(self, config: HarmoniCaConfig) -> None:
        self.tau = config.tau
        self.predictor: Predictor
        if config.reuse_op == "linear":
            self.predictor = self._forecast = _Corrected(config)
        else:
            self.predictor, self._forecast = predictor_of(config.reuse_op, granularity=config.granularity)(), None
        self._scores: Tensor | None = None
        self._computes: list[bool] = []

    def set_row(self, row: Row | None) -> None:
        """The scores and corrections of the step that comes next."""
        self._scores, corrections = row if row is not None else (None, None)
        self._computes = [] if self._scores is None else (self._scores.detach() > self.tau).tolist()
        if self._forecast is not None:
            self._forecast.corrections = corrections

    def blend(self, unit: int, step: int, inputs: Features, outputs: Features) -> Features:
        """See `Student`."""
        computed, result = outputs[0], outputs
        if self._scores is not None:
            score = self._scores[unit].to(computed.dtype)
            reused = self.predictor.predict(unit, step, inputs)
            result = tuple(score * a + (1 - score) * b for a, b in zip(outputs, reused, strict=True))
        if self._scores is None or self._computes[unit]:
            self.predictor.observe(unit, step, inputs, tuple(output.detach() for output in outputs))
        return result


class _Corrected(LinearForecast):
    """Taylor-1 from wherever the last values were computed, corrected by what is learned."""

    corrections: Tensor | None = None

    def __init__(self, config: HarmoniCaConfig) -> None:
        steps, units, history = len(config.timesteps), len(config.units), config.history
        inputs = torch.zeros(steps, units, history + 1) if config.sees_inputs else None
        super().__init__(torch.zeros(steps, units, history), inputs)

    def weights(self, step: int, unit: int, steps: Sequence[int]) -> tuple[Weights, Weights]:
        taylor = taylor_weights(step, steps, self.history)
        if self.corrections is None:
            return taylor, []
        outputs, inputs = self.corrections[unit][: self.history], self.corrections[unit][self.history :]
        return torch.tensor(taylor, device=outputs.device) + outputs, inputs


class Sampler:
    """The pipeline's own sampler with the student, or the teacher, in the network's place."""

    def __init__(
        self, running: DiffusionDriver, handle: ReuseHandle, config: HarmoniCaConfig, guidance: float | None = None
    ) -> None:
        """`guidance`: another one than the config's; 1 runs without."""
        self.running, self.handle, self.config = running, handle, config
        self.guidance = config.guidance if guidance is None else guidance

    def unguided(self) -> Sampler:
        """The same without guidance."""
        return Sampler(self.running, self.handle, self.config, 1.0)

    def scheduler(self) -> Any:
        """A fresh one at the recipe's timesteps."""
        return self.running.sampler(len(self.config.timesteps), self.running.device)

    def output(
        self, latents: Tensor, step: int, scheduler: Any, conditions: Conditions, soft: SoftCache | None
    ) -> Tensor:
        """The guided prediction; of the plain backbone without a soft cache."""
        timestep = scheduler.timesteps[step]
        shown = scheduler.scale_model_input(latents, timestep)
        with self._student(soft):
            self.handle.clock.pin(step)
            output = self.running.guided(shown, timestep, conditions, self.guidance)
        return output.to(latents.dtype)

    @contextmanager
    def _student(self, soft: SoftCache | None) -> Iterator[None]:
        if soft is None:
            with self.handle.bypassed():
                yield
            return
        self.handle.student = soft
        try:
            yield
        finally:
            self.handle.student = None

    @torch.no_grad()
    def final(self, latents: Tensor, conditions: Conditions, table: Table) -> Tensor:
        """Final latents [B, C, H, W] of the student."""
        for *_, after in self._walk(latents, conditions, table):
            latents = after
        return latents

    @torch.no_grad()
    def errors(self, latents: Tensor, conditions: Conditions, table: Table) -> Tensor:
        """Mean squared difference [T] of the student's predictions to the plain backbone's from the same latents."""
        found = []
        for step, scheduler, before, output, _ in self._walk(latents, conditions, table):
            found.append((self.output(before, step, scheduler, conditions, None) - output).square().mean())
        return torch.stack(found)

    def _walk(
        self, latents: Tensor, conditions: Conditions, table: Table
    ) -> Iterator[tuple[int, Any, Tensor, Tensor, Tensor]]:
        """Of every step: its number, the sampler, the latents, the student's prediction, and the latents after it."""
        scheduler, soft = self.scheduler(), SoftCache(self.config)
        for step in range(len(self.config.timesteps)):
            soft.set_row(table(step))
            output = self.output(latents, step, scheduler, conditions, soft)
            before, timestep = latents, scheduler.timesteps[step]
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
            yield step, scheduler, before, output, latents
