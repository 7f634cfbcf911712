"""Multistep solvers with learned coefficients.

Every explicit linear multistep solver of the diffusion ODE in data-prediction form is one row of numbers per step,

    x_{i+1} = a_i x_i + sum_j b_ij D_{i-j},        D = the denoised latents that the network predicts,

and DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, eq. 9 and algorithm 2) is one choice of them.  A non-stationary
solver chooses each row freely (Shaul et al. 2024, arXiv:2403.01329); here the rows are fitted by least squares to a
reference trajectory, step after step on the solver's own states, which needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SolverTable:
    """All numbers of a multistep solver of m steps.

    timesteps: m integers, falling.  alphas: m signal levels alpha_t (noise level sqrt(1 - alpha_t^2)).
    state: m weights a_i of the current latents.  data: m rows of weights b_ij of the newest predictions, newest first.
    """

    timesteps: list[int]
    alphas: list[float]
    state: list[float]
    data: list[list[float]]
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        lengths = {len(self.timesteps), len(self.alphas), len(self.state), len(self.data)}
        if lengths != {len(self.timesteps)} or not self.timesteps:
            raise ValueError(f"a solver table needs one row per step, and has parts of lengths {sorted(lengths)}")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"a solver's timesteps must fall, and are {self.timesteps}")


def dpm_solver_table(
    timesteps: list[int],
    alphas_cumprod: Tensor,
    prediction_type: str,
    history: int = 4,
    first_order: Sequence[bool] = (),
) -> SolverTable:
    """DPM-Solver++(2M), midpoint form, with a first-order first and last step, as a table.

    Args:
        timesteps: m falling integers.
        alphas_cumprod: [T], alpha_t^2 of the training schedule.
        history: how many predictions a row may use (this solver uses two).
        first_order: steps that use their own prediction alone, which is DDIM (Song et al. 2021, arXiv:2010.02502).
    """
    alphas = alphas_cumprod.double()[timesteps].sqrt()
    sigmas = (1 - alphas**2).sqrt()
    lambdas = (alphas / sigmas).log()
    state, data = [], []
    for i in range(len(timesteps) - 1):
        h = float(lambdas[i + 1] - lambdas[i])
        gain = float(alphas[i + 1]) * -torch.expm1(torch.tensor(-h, dtype=torch.float64)).item()
        # An order-2 row needs a predecessor at finite signal-to-noise ratio.
        alone = not i or (len(first_order) > i and first_order[i])
        half = 0.0 if alone else 0.5 * gain * h / float(lambdas[i] - lambdas[i - 1])
        state.append(float(sigmas[i + 1] / sigmas[i]))
        data.append([gain + half, -half] + [0.0] * (history - 2))
    state.append(0.0)
    data.append([1.0] + [0.0] * (history - 1))
    return SolverTable(
        timesteps=list(timesteps), alphas=alphas.tolist(), state=state, data=data, prediction_type=prediction_type
    )


def denoised(output: Tensor, latents: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """The denoised latents that a network output implies at signal level `alpha`.

    Raises:
        ValueError: `prediction_type` is none of epsilon, v_prediction, sample.
    """
    sigma = math.sqrt(1 - alpha**2)
    if prediction_type == "epsilon":
        return (latents - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * output
    if prediction_type == "sample":
        return output
    raise ValueError(f"prediction_type is '{prediction_type}', not one of epsilon, v_prediction, sample")


def noise_of(output: Tensor, latents: Tensor, alpha: float, prediction_type: str) -> Tensor:
    """The noise that a network output implies at signal level `alpha`."""
    if prediction_type == "epsilon":
        return output
    sigma = math.sqrt(1 - alpha**2)
    return (latents - alpha * denoised(output, latents, alpha, prediction_type)) / sigma


@dataclass
class History:
    """The newest denoised predictions of a running trajectory, newest first."""

    limit: int
    kept: list[Tensor] = field(default_factory=list)

    def push(self, prediction: Tensor) -> list[Tensor]:
        """Adds one and returns all that are kept."""
        self.kept = [prediction, *self.kept][: self.limit]
        return self.kept


def combine(state: float, data: list[float], latents: Tensor, kept: list[Tensor]) -> Tensor:
    """One step: the table row applied to latents and kept predictions (missing ones count as zero weight)."""
    result = state * latents
    for weight, prediction in zip(data, kept, strict=False):
        result = result + weight * prediction
    return result


def fit_row(latents: Tensor, kept: list[Tensor], target: Tensor, ridge: float = 1e-6) -> tuple[float, list[float]]:
    """The row that takes latents and predictions nearest to `target` in the least-squares sense.

    Args:
        latents, target: [B, C, H, W].
        kept: up to `history` predictions of the same shape, newest first.
        ridge: relative to the mean square of the features; predictions of neighbouring steps are nearly collinear.
    Returns:
        the weight of the latents, and one weight per prediction.
    """
    features = torch.stack([latents, *kept]).double().flatten(1)
    gram = features @ features.T
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, features @ target.double().flatten()).tolist()
    return solution[0], solution[1:]


class LearnedMultistepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A `SolverTable` as a diffusers scheduler.

    The timesteps are the table's own: a pipeline that asks for another number of steps is refused.
    """

    order = 1
    init_noise_sigma = 1.0
    config_name = "scheduler_config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        timesteps: list[int],
        alphas: list[float],
        state: list[float],
        data: list[list[float]],
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
    ) -> None:
        self.table = SolverTable(
            timesteps=timesteps, alphas=alphas, state=state, data=data, prediction_type=prediction_type
        )
        self.timesteps = torch.tensor(timesteps)
        self.num_inference_steps = len(timesteps)
        self._begin()

    def _begin(self) -> None:
        self._step_index = 0
        self._history = History(len(self.table.data[0]))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: list[int] | None = None
    ) -> None:
        """Begins a trajectory.

        Raises:
            ValueError: another number of steps, or other timesteps, than the table was fitted for.
        """
        wanted = timesteps if timesteps is not None else num_inference_steps
        own = self.table.timesteps
        if (timesteps is not None and list(timesteps) != own) or (timesteps is None and wanted not in (None, len(own))):
            raise ValueError(f"this solver was fitted for {len(own)} steps at {own}, and was asked for {wanted}")
        self.timesteps = torch.tensor(own, device=device)
        self._begin()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as they are: this form needs no scaling."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """The latents of the next timestep; steps are counted, `timestep` is not read (no host synchronisation)."""
        i = self._step_index
        if i >= len(self.table.timesteps):
            raise ValueError(f"this solver has {i} steps, and all are done: call set_timesteps to begin anew")
        wide = torch.promote_types(sample.dtype, torch.float32)
        latents = sample.to(wide)
        kept = self._history.push(
            denoised(model_output.to(wide), latents, self.table.alphas[i], self.table.prediction_type)
        )
        result = combine(self.table.state[i], self.table.data[i], latents, kept).to(sample.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)
