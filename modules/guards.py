"""Checks that a pipeline runs as an adapter was trained, at the cost of one look per trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from modules.diffusion_host import StepClock


class GuidanceGuard:
    """Refuses a guidance scale that differs from the trained one.

    A pipeline tells its modules nothing about guidance, but both halves of the first forward and the combination that
    reaches the scheduler give it away: combined = nothing + w (asked - nothing).  A model that was distilled for
    guidance (Flux) is told in its `guidance` argument.
    """

    tolerance = 0.02  # relative; half precision rounds the combination

    def __init__(self, pipe: Any, clock: StepClock, guidance: float) -> None:
        self.clock, self.guidance, self.scheduler = clock, guidance, pipe.scheduler
        self._halves: tuple[Tensor, ...] = ()
        self._asked_last = type(pipe).__name__ != "DiTPipeline"
        self._told: Tensor | None = None
        self._remover = clock.transformer.register_forward_hook(self._see_output, with_kwargs=True)
        self._before = vars(self.scheduler).get("step")
        self.scheduler.step = self._checked(self.scheduler.step)

    def _see_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.clock.step == 0:
            self._told = kwargs.get("guidance")
            sample = output[0] if isinstance(output, tuple) else output.sample
            self._halves = (sample,)

    def _checked(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)  # pipelines look at the signature to see whether eta and a generator are accepted
        def checked(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._halves:
                (sample,), self._halves = self._halves, ()
                self._check(sample, model_output)
            return step(model_output, *args, **kwargs)

        return checked

    def _check(self, sample: Tensor, combined: Tensor) -> None:
        channels, rows = combined.shape[1], len(sample)
        found = 1.0 if self._told is None else float(self._told.flatten()[0])
        # DiT's pipeline keeps both halves through the scheduler; the others keep one.
        doubled = not self._asked_last and rows % 2 == 0 and rows == len(combined)
        if doubled or rows == 2 * len(combined):
            first, second = sample[:, :channels].float().chunk(2)
            asked, nothing = (second, first) if self._asked_last else (first, second)
            direction, reached = asked - nothing, combined[: len(asked)].float() - nothing
            length = float(direction.square().sum())
            if length <= 1e-10 * float(nothing.square().sum()):
                return  # nothing was asked for: every guidance is the same
            found = float(torch.sum(reached * direction)) / length
        if abs(found - self.guidance) > self.tolerance * self.guidance:
            raise ValueError(
                f"this adapter was trained for guidance_scale {self.guidance:g} and the pipeline runs {found:.3g}: "
                "call it with **handle.call_kwargs, or train an adapter for that guidance"
            )

    def detach(self) -> None:
        """Gives the scheduler its own `step` back."""
        self._remover.remove()
        if self._before is None:
            vars(self.scheduler).pop("step", None)
        else:
            self.scheduler.step = self._before


_NOISE_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
_SOLVER = (
    "algorithm_type",
    "solver_order",
    "solver_type",
    "timestep_spacing",
    "final_sigmas_type",
    "use_karras_sigmas",
    "lower_order_final",
    "thresholding",
    "clip_sample",
    "set_alpha_to_one",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
)


def sampler_entry(scheduler: Any, whole: bool) -> dict[str, Any]:
    """What a pipeline's scheduler must agree with: its noise schedule, and with `whole` its class and solver too."""
    names = [*_NOISE_SCHEDULE, *(_SOLVER if whole else ())]
    kept = {name: scheduler.config[name] for name in names if name in scheduler.config}
    return {**({"class": type(scheduler).__name__} if whole else {}), **kept}


def check_sampler(made: dict[str, Any], scheduler: Any) -> None:
    """Raises ValueError where a scheduler differs from a `sampler_entry`, naming what differs."""
    for name, value in made.items():
        here = type(scheduler).__name__ if name == "class" else scheduler.config.get(name)
        if here != value:
            raise ValueError(
                f"this adapter was trained for a scheduler with {name} {value!r} and the pipeline's has {here!r}: "
                "give the pipeline the scheduler it came with"
            )


def check_timesteps(made: Sequence[int], clock: StepClock) -> None:
    """Raises ValueError where a trajectory that begins has other timesteps; a clock that knows none is let pass."""
    here = [int(t) for t in clock.timesteps]
    if here and here != list(made):
        raise ValueError(
            f"this adapter was trained for {len(made)} steps at timesteps {list(made)} but the scheduler runs "
            f"{len(here)} at {here}: call the pipeline with **handle.call_kwargs"
        )
