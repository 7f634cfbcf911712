"""A tiny random Flux pipeline: two double and two single blocks, CLIP and T5, a KL autoencoder, a flow sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from modules import pipelines
from modules.pipelines import FluxDriver
from tests.tiny import CAPTION_WIDTH, LATENT_CHANNELS, LATENT_SIZE, _noisy, _tiny_text

DOUBLE, SINGLE = 2, 2
CALL: dict[str, Any] = {"height": 2 * LATENT_SIZE, "width": 2 * LATENT_SIZE, "max_sequence_length": 8}
PROMPTS = ["a red circle", "a blue square on grey"]


def tiny_flux(distilled: bool = True, seed: int = 0) -> FluxTransformer2DModel:
    """A Flux transformer, 2 heads of 8; `distilled` takes guidance as an argument."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CAPTION_WIDTH,
        pooled_projection_dim=8,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    )
    return _noisy(model, seed, 0.1)  # type: ignore[return-value]


def tiny_flux_pipeline(distilled: bool = True) -> FluxPipeline:
    """Images are 16x16; call it with `CALL`."""
    tokenizer, text_encoder = _tiny_text()
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=2 * LATENT_SIZE,
        scaling_factor=0.5,
        shift_factor=0.1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval().requires_grad_(False),
        text_encoder=CLIPTextModel(clip).eval().requires_grad_(False),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        transformer=tiny_flux(distilled),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_driver(distilled: bool = True) -> FluxDriver:
    """The driver of a fresh tiny pipeline."""
    return FluxDriver(tiny_flux_pipeline(distilled), CALL)


def save_tiny_flux(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A saved pipeline, of which `driver` then knows `CALL`, and a file of prompts beside it."""
    path = folder / "flux"
    if not path.exists():
        tiny_flux_pipeline().save_pretrained(path)
        lines = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square")]
        (folder / "prompts.txt").write_text("\n".join(lines * 2) + "\n")
    monkeypatch.setitem(pipelines._EMBEDDED_CALL, str(path), CALL)
    return str(path)
