"""One way to talk to diffusion pipelines: encode conditions, call the denoiser as the pipeline does, draw images.

Training needs the bare denoiser call under classifier-free guidance; evaluation needs the pipeline itself.  A driver
offers both for one pipeline class, and nothing else about the class is known elsewhere.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from modules.embedded import EMBEDDED, source_of


@dataclass(frozen=True)
class Conditions:
    """What B images are conditioned on: tensors by name, first dimension B, and what stands for "nothing asked"."""

    asked: dict[str, Tensor]
    nothing: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.asked.values())))

    def select(self, index: Tensor) -> Conditions:
        """The conditions of some of the images; `index` is an integer tensor [B']."""
        return Conditions({k: v[index] for k, v in self.asked.items()}, {k: v[index] for k, v in self.nothing.items()})

    def drop(self, dropped: Tensor) -> Conditions:
        """Nothing asked where the boolean tensor `dropped` [B] is true."""
        asked = {
            k: torch.where(dropped.view(-1, *[1] * (v.dim() - 1)), self.nothing[k], v) for k, v in self.asked.items()
        }
        return Conditions(asked, self.nothing)


class DiffusionDriver(ABC):
    """A text- or class-conditional latent diffusion pipeline with a transformer denoiser.

    Shapes: B images, C latent channels, H x W latent size.
    """

    def __init__(self, pipe: DiffusionPipeline, call: dict[str, Any] | None = None) -> None:
        """`call` holds keyword arguments that every `pipe(...)` of this backbone needs."""
        self.pipe, self.call = pipe, dict(call or {})
        self.transformer: nn.Module = pipe.transformer
        self.latent_shape = self._latent_shape()

    def _latent_shape(self) -> tuple[int, int, int]:
        config: Any = self.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's parameter dtype."""
        return next(self.transformer.parameters()).dtype

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise [B, C, H, W] that the pipeline itself draws for one generator per image."""
        rows = [torch.randn((1, *self.latent_shape), generator=_generator(s), dtype=self.dtype) for s in seeds]
        return torch.cat(rows).to(self.device)

    def sampler(self, steps: int, device: torch.device | None = None) -> Any:
        """A fresh scheduler like the pipeline's, with the timesteps that the pipeline's call gives it.

        Args:
            device: of its timesteps; the host if left out.
        """
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Conditions:
        """Conditions of B prompts or class labels."""

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The denoiser's output [B, C, H, W] without guidance (learned variances cut off); `timestep` is [B]."""

    @abstractmethod
    def join(self, conditions: Conditions) -> dict[str, Tensor]:
        """Both halves of classifier-free guidance as one batch of 2B, in the pipeline's own order."""

    asked_first: bool

    def guided(self, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """The guided output [B, C, H, W] from one forward on 2B rows, exactly as the pipeline computes it.

        Args:
            latents: [B, C, H, W].
            timestep: a scalar tensor on the denoiser's device.
            guidance: 1 or less runs B rows without guidance.
        """
        latents = latents.to(self.dtype)  # training keeps its states in float32 whatever the backbone runs in
        if guidance <= 1:
            return self.denoise(latents, timestep.expand(len(latents)), conditions.asked)
        out = self.denoise(torch.cat([latents, latents]), timestep.expand(2 * len(latents)), self.join(conditions))
        first, second = out.chunk(2)
        asked, nothing = (first, second) if self.asked_first else (second, first)
        return nothing + guidance * (asked - nothing)

    @abstractmethod
    def pipeline_arguments(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """How the pipeline's call names its inputs."""

    @torch.no_grad()
    def generate(self, inputs: Sequence[Any], seeds: Sequence[int], **call: Any) -> Tensor:
        """Images [B, 3 or 1, height, width] in -1..1, drawn by the pipeline's own call.

        Args:
            inputs: B prompts or labels.
            seeds: B seeds; the same seed draws the same initial noise.
            call: further arguments of the pipeline's call, over the driver's own.
        """
        arguments = {**self.call, **call, **self.pipeline_arguments(inputs)}
        generators = [_generator(seed) for seed in seeds]
        images: Tensor = self.pipe(generator=generators, output_type="pt", **arguments).images
        return images * 2 - 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in -1..1 of latents [B, C, H, W]."""
        images: Tensor = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return images.clamp(-1, 1)

    @torch.no_grad()
    def latents_of(self, images: Tensor) -> Tensor:
        """Latents [B, C, H, W] of images [B, 3 or 1, height, width] in -1..1."""
        encoded = self.pipe.vae.encode(images)
        latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return latents * float(self.pipe.vae.config.scaling_factor)

    def _prediction(self, out: Tensor) -> Tensor:
        return out[:, : self.latent_shape[0]]


class PixArtDriver(DiffusionDriver):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`."""

    asked_first = False

    def __init__(self, pipe: DiffusionPipeline, call: dict[str, Any] | None = None) -> None:
        # Cleaning by web-text rules is off, so that a caption means what it says.
        super().__init__(pipe, {"clean_caption": False, **(call or {})})

    def encode(self, inputs: Sequence[str]) -> Conditions:
        """Conditions of B prompts, padded to the longest that the call allows."""
        length = {k: v for k, v in self.call.items() if k == "max_sequence_length"}
        with torch.no_grad():
            text, mask, no_text, no_mask = self.pipe.encode_prompt(
                list(inputs), do_classifier_free_guidance=True, clean_caption=False, device=self.device, **length
            )
        return Conditions({"text": text, "mask": mask}, {"text": no_text, "mask": no_mask})

    def join(self, conditions: Conditions) -> dict[str, Tensor]:
        """Nothing asked first, as in the pipeline."""
        return {k: torch.cat([conditions.nothing[k], v]) for k, v in conditions.asked.items()}

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """See the parent."""
        return self._prediction(
            self.transformer(
                latents,
                encoder_hidden_states=conditions["text"],
                encoder_attention_mask=conditions["mask"],
                timestep=timestep,
                added_cond_kwargs=self._size_conditions(len(latents)),
                return_dict=False,
            )[0]
        )

    def _size_conditions(self, rows: int) -> dict[str, Tensor | None]:
        if self.latent_shape[1] != 128:
            return {"resolution": None, "aspect_ratio": None}
        pixels = self.latent_shape[1] * self.pipe.vae_scale_factor
        size = torch.full((rows, 2), float(pixels), dtype=self.dtype, device=self.device)
        return {"resolution": size, "aspect_ratio": torch.ones_like(size[:, :1])}

    def pipeline_arguments(self, inputs: Sequence[str]) -> dict[str, Any]:
        """The prompts."""
        return {"prompt": list(inputs)}


class DiTDriver(DiffusionDriver):
    """`DiTPipeline`; inputs are class indices."""

    asked_first = True
    null_class = 1000  # fixed in diffusers' pipeline, whatever the model

    def encode(self, inputs: Sequence[int]) -> Conditions:
        """Conditions of B class indices."""
        labels = torch.tensor(list(inputs), device=self.device)
        return Conditions({"labels": labels}, {"labels": torch.full_like(labels, self.null_class)})

    def join(self, conditions: Conditions) -> dict[str, Tensor]:
        """The asked classes first, as in the pipeline."""
        return {k: torch.cat([v, conditions.nothing[k]]) for k, v in conditions.asked.items()}

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """See the parent."""
        labels = conditions["labels"]
        return self._prediction(self.transformer(latents, timestep, labels, return_dict=False)[0])

    def pipeline_arguments(self, inputs: Sequence[int]) -> dict[str, Any]:
        """The class labels."""
        return {"class_labels": [int(label) for label in inputs]}


class FluxDriver(DiffusionDriver):
    """`FluxPipeline`: one forward a step, whose guidance is an argument of the model or, for schnell, is not.

    Latents are [B, C, H, W] as everywhere; the model sees patches of 2 x 2 in a row.
    """

    asked_first = True

    def _latent_shape(self) -> tuple[int, int, int]:
        scale, default = self.pipe.vae_scale_factor, self.pipe.default_sample_size
        height, width = (2 * int(self.call.get(side, default * scale) // (2 * scale)) for side in ("height", "width"))
        config: Any = self.transformer.config
        return (config.in_channels // 4, height, width)

    def sampler(self, steps: int, device: torch.device | None = None) -> Any:
        """See the parent; the shift of the timesteps depends on the number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        config, tokens = scheduler.config, self.latent_shape[1] * self.latent_shape[2] // 4
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        bounds = [config.get(name, value) for name, value in zip(names, (256, 4096, 0.5, 1.15), strict=True)]
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        given = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
        scheduler.set_timesteps(**given, mu=calculate_shift(tokens, *bounds), device=device)
        if not hasattr(scheduler, "scale_model_input"):
            # A flow's noise and inputs have unit scale; saying so spares every caller the question.
            scheduler.scale_model_input, scheduler.init_noise_sigma = _unscaled, 1.0
        return scheduler

    @torch.no_grad()
    def encode(self, inputs: Sequence[str]) -> Conditions:
        """Conditions of B prompts."""
        length = {k: v for k, v in self.call.items() if k == "max_sequence_length"}
        asked, nothing = (
            self.pipe.encode_prompt(prompt=prompts, prompt_2=None, device=self.device, **length)
            for prompts in (list(inputs), [""])
        )
        rows = len(inputs)
        return Conditions(
            {"text": asked[0], "pooled": asked[1]},
            {"text": nothing[0].expand(rows, -1, -1), "pooled": nothing[1].expand(rows, -1)},
        )

    def join(self, conditions: Conditions) -> dict[str, Tensor]:
        """What is asked: there is no second half."""
        return conditions.asked

    def guided(self, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """See the parent; B rows in any case."""
        config: Any = self.transformer.config
        asked = dict(conditions.asked)
        if config.guidance_embeds:
            asked["guidance"] = torch.full((len(latents),), guidance, device=latents.device, dtype=torch.float32)
        return self.denoise(latents.to(self.dtype), timestep.expand(len(latents)), asked)

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """See the parent; `conditions` may hold a `guidance` [B]."""
        rows, channels, height, width = latents.shape
        place: dict[str, Any] = {"device": latents.device, "dtype": latents.dtype}
        image_ids = self.pipe._prepare_latent_image_ids(rows, height // 2, width // 2, **place)
        out = self.transformer(
            hidden_states=self.pipe._pack_latents(latents, rows, channels, height, width),
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=conditions.get("guidance"),
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["text"],
            txt_ids=torch.zeros(conditions["text"].shape[1], 3, **place),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        scale = self.pipe.vae_scale_factor
        unpacked: Tensor = self.pipe._unpack_latents(out, height * scale, width * scale, scale)
        return unpacked

    def pipeline_arguments(self, inputs: Sequence[str]) -> dict[str, Any]:
        """The prompts."""
        return {"prompt": list(inputs)}

    def decode(self, latents: Tensor) -> Tensor:
        """See the parent; this autoencoder's latents are shifted too."""
        config = self.pipe.vae.config
        images: Tensor = super().decode(latents + config.shift_factor * config.scaling_factor)
        return images

    def latents_of(self, images: Tensor) -> Tensor:
        """See `decode`."""
        config = self.pipe.vae.config
        latents: Tensor = super().latents_of(images) - config.shift_factor * config.scaling_factor
        return latents


def _unscaled(sample: Tensor, timestep: Any = None) -> Tensor:
    return sample


_DRIVERS: dict[str, type[DiffusionDriver]] = {
    "PixArtAlphaPipeline": PixArtDriver,
    "PixArtSigmaPipeline": PixArtDriver,
    "DiTPipeline": DiTDriver,
    "FluxPipeline": FluxDriver,
}

# What the embedded pipelines need in every call: they are smaller than diffusers' resolution bins, and their captions
# shorter than its default padding.
_EMBEDDED_CALL: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "max_sequence_length": 16, "guidance_scale": 2.5},
    "dit": {"guidance_scale": 1.5},
}


def driver(pipe: DiffusionPipeline, name: str = "") -> DiffusionDriver:
    """The driver of a pipeline; `name` is the backbone's name, for the call arguments that embedded ones need.

    Raises:
        ValueError: no driver for this pipeline class.
    """
    kind = type(pipe).__name__
    if kind not in _DRIVERS:
        raise ValueError(f"the pipeline is a {kind}, and only {', '.join(sorted(_DRIVERS))} can be driven")
    return _DRIVERS[kind](pipe, _EMBEDDED_CALL.get(name.removeprefix(EMBEDDED), {}))


def load_pipeline(name: str, revision: str | None = None, dtype: str = "float32") -> DiffusionPipeline:
    """A frozen pipeline from a Hub id, a folder, or `embedded:<name>`.

    Raises:
        ValueError: no such embedded backbone, or the folder holds no pipeline.
    """
    source = source_of(name, "model_index.json", "pipeline")
    with _quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(source, revision=revision, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return pipe


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences loading bars, and diffusers' warnings that DiT's autoencoder is of a class it did not expect."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


__all__ = ["Conditions", "DiTDriver", "DiffusionDriver", "FluxDriver", "PixArtDriver", "driver", "load_pipeline"]
