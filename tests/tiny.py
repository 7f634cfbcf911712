"""Tiny random pipelines and transformers that many tests share.  Every parameter is noise, so every block matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("a", "red", "green", "blue", "circle", "square", "on", "grey")
CAPTION_WIDTH = 12
LATENT_CHANNELS, LATENT_SIZE = 4, 8


def _noisy(module: nn.Module, seed: int, std: float) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def tiny_pixart(layers: int = 4, seed: int = 0) -> PixArtTransformer2DModel:
    """A PixArt transformer, 2 heads of 8, 16 tokens of 8x8 latents with 4 channels."""
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=layers,
        sample_size=LATENT_SIZE,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=CAPTION_WIDTH,
        use_additional_conditions=False,
    )
    return _noisy(model, seed, 0.1)


def tiny_dit(layers: int = 4, seed: int = 0) -> DiTTransformer2DModel:
    """A DiT transformer of the same size; the class count is the one that DiTPipeline takes for granted."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=layers,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return _noisy(model, seed, 0.1)


def tiny_transformer(kind: str, layers: int = 4, seed: int = 0) -> nn.Module:
    """`tiny_pixart` or `tiny_dit` by the name "pixart" or "dit"."""
    return tiny_pixart(layers, seed) if kind == "pixart" else tiny_dit(layers, seed)


def call_kwargs(kind: str, batch: int, seed: int = 0) -> dict[str, Any]:
    """Conditions of a bare transformer call: everything but hidden_states and timestep."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "dit":
        return {"class_labels": torch.randint(0, 1000, (batch,), generator=generator)}
    return {
        "encoder_hidden_states": torch.randn(batch, 5, CAPTION_WIDTH, generator=generator),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@torch.no_grad()
def forward(model: nn.Module, kind: str, batch: int = 2) -> Tensor:
    """One bare transformer call on fixed inputs."""
    latents = torch.randn(batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(7))
    return model(latents, timestep=torch.full((batch,), 500), **call_kwargs(kind, batch)).sample


@contextmanager
def cache_context(model: nn.Module, name: str) -> Iterator[None]:
    """What diffusers' CacheMixin.cache_context does, for models that do not inherit it."""
    _set_cache_context(model, CacheContext(name))
    yield
    _set_cache_context(model, None)


@torch.no_grad()
def denoise(model: nn.Module, kind: str, steps: int, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """A plain sampling loop on a bare transformer; the transformer's output at every step."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    outputs = []
    for timestep in scheduler.timesteps:
        output = model(latents, timestep=timestep.expand(batch), **call_kwargs(kind, batch)).sample
        latents = scheduler.step(output[:, :LATENT_CHANNELS], timestep, latents).prev_sample
        outputs.append(output)
    return outputs


def _tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=2 * LATENT_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return vae.eval().requires_grad_(False)


def _tiny_text() -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=CAPTION_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    return fast, T5EncoderModel(config).eval().requires_grad_(False)


def tiny_pixart_pipeline(
    pipeline: type[PixArtAlphaPipeline | PixArtSigmaPipeline] = PixArtAlphaPipeline, layers: int = 4
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """A PixArt pipeline with T5, KL autoencoder and DPM-Solver++; images are 16x16.  Call it with `PIXART_CALL`."""
    tokenizer, text_encoder = _tiny_text()
    pipe = pipeline(tokenizer, text_encoder, _tiny_vae(), tiny_pixart(layers), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit_pipeline(layers: int = 4) -> DiTPipeline:
    """A DiT pipeline with KL autoencoder and DDIM; images are 16x16.  Call it with class labels."""
    pipe = DiTPipeline(tiny_dit(layers), _tiny_vae(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXART_CALL: dict[str, Any] = {
    "height": 2 * LATENT_SIZE,
    "width": 2 * LATENT_SIZE,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 8,
    "output_type": "latent",
}


def tiny_pipeline(kind: str, layers: int = 4) -> Any:
    """`tiny_pixart_pipeline` or `tiny_dit_pipeline` by the name "pixart" or "dit"."""
    return tiny_pixart_pipeline(layers=layers) if kind == "pixart" else tiny_dit_pipeline(layers)


def generate(pipe: Any, steps: int = 6, batch: int = 1, seed: int = 0, **call: Any) -> Tensor:
    """Runs a tiny pipeline with guidance and returns what it returns, as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    common = {"num_inference_steps": steps, "generator": generator, "guidance_scale": 3.0}
    if isinstance(pipe, DiTPipeline):
        labels = list(range(1, batch + 1))
        return torch.from_numpy(pipe(labels, **{**common, "output_type": "np", **call}).images)
    images = pipe(["a red circle on blue"] * batch, **{**common, **PIXART_CALL, **call}).images
    return images if isinstance(images, Tensor) else torch.from_numpy(images)
