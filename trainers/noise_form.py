"""A denoiser in noise form, whatever its backbone predicts, and what its errors do to the image."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.pipelines import Conditions, DiffusionDriver
from modules.solvers import noise_of


class NoisePredictor:
    """A denoiser in noise form, whatever its backbone predicts."""

    def __init__(self, driver: DiffusionDriver) -> None:
        """Raises ValueError where the sampler has no noise schedule to say it in."""
        scheduler = driver.pipe.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"a {type(scheduler).__name__} is a flow, without noise levels: for harmonica set objective.kind to "
                "sdt and objective.lambda_mode to paper, telescoping or none"
            )
        self.driver = driver
        self.prediction_type = str(scheduler.config.prediction_type)
        self.alphas: list[float] = scheduler.alphas_cumprod.double().sqrt().tolist()

    def __call__(self, latents: Tensor, timestep: int, conditions: Conditions, guidance: float = 1.0) -> Tensor:
        """The noise [B, C, H, W] in latents at one timestep; guidance 1 or less runs the asked half alone."""
        t = torch.tensor(timestep, device=latents.device)
        output = self.driver.guided(latents.to(self.driver.dtype), t, conditions, guidance)
        return noise_of(output.to(latents.dtype), latents, self.alphas[timestep], self.prediction_type)

    def levels(self, timestep: int) -> tuple[float, float]:
        """Signal and noise level of a timestep; -1 stands for clean latents."""
        alpha = 1.0 if timestep < 0 else self.alphas[timestep]
        return alpha, (1 - alpha**2) ** 0.5

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Latents at a timestep from clean ones."""
        alpha, sigma = self.levels(timestep)
        return alpha * clean + sigma * noise

    def ddim(self, latents: Tensor, noise: Tensor, timestep: int, following: int) -> Tensor:
        """One DDIM step (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta 0)."""
        alpha, sigma = self.levels(timestep)
        next_alpha, next_sigma = self.levels(following)
        return next_alpha / alpha * (latents - sigma * noise) + next_sigma * noise

    def invert(self, latents: Tensor, landed: Tensor, timestep: int, following: int) -> Tensor:
        """The noise for which one DDIM step from `latents` ends at `landed`."""
        alpha, sigma = self.levels(timestep)
        next_alpha, next_sigma = self.levels(following)
        ratio = next_alpha / alpha
        return (landed - ratio * latents) / (next_sigma - ratio * sigma)


def image_weights(predict: NoisePredictor, timesteps: list[int]) -> list[float]:
    """How much an error in each step's noise moves the clean latents, squared, with mean 1."""
    weights = []
    for here, there in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha, sigma = predict.levels(here)
        next_alpha, next_sigma = predict.levels(there)
        weights.append(((next_sigma - next_alpha / alpha * sigma) / next_alpha) ** 2)
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]
