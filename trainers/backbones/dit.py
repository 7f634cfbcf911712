"""The embedded `dit`: a class-conditional DiT pipeline of scikit-learn's handwritten digits."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import nn

from data.digits import CLASSES, class_labels, digit_accuracy, digit_batch
from trainers.backbones.autoencoder import identity_autoencoder

NULL_CLASS = 1000  # what diffusers' DiTPipeline hands to the unconditional half, whatever the model
GUIDANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how wide; the defaults made the shipped backbone."""

    steps: int = 5000
    batch_size: int = 64
    heads: int = 3
    layers: int = 10
    lr: float = 1.2e-3
    warmup: int = 200
    ema: float = 0.998
    drop_label: float = 0.1


def build_pipeline(recipe: Recipe) -> DiTPipeline:
    """An untrained pipeline on the identity latent."""
    vae = identity_autoencoder(1, 8)
    # Images span -1..1 with standard deviation 0.75; the latent is the image itself.
    transformer = DiTTransformer2DModel(
        num_attention_heads=recipe.heads, attention_head_dim=32, in_channels=1, out_channels=1,
        num_layers=recipe.layers, sample_size=8, patch_size=2, num_embeds_ada_norm=NULL_CLASS,
    )  # fmt: skip
    for block in transformer.transformer_blocks:
        # adaLN-Zero (Peebles and Xie 2023, §3.2): every block starts as the identity.
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    return DiTPipeline(transformer, vae, scheduler, id2label={i: str(i) for i in range(CLASSES)})


def train_dit(recipe: Recipe) -> DiTPipeline:
    """Trains the transformer; returns the pipeline with its averaged weights."""
    torch.manual_seed(0)
    pipe = build_pipeline(recipe)
    transformer = pipe.transformer.train()
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # one drop per sample below, not one per block
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def rate(step: int) -> float:
        late = max(0.0, (step - 0.3 * recipe.steps) / (0.7 * recipe.steps))
        return min(1.0, (step + 1) / recipe.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    start, running = time.time(), 0.0
    for step in range(recipe.steps):
        images, labels = digit_batch(step, recipe.batch_size)
        labels[torch.rand(len(labels), generator=generator) < recipe.drop_label] = NULL_CLASS
        t = torch.randint(0, 1000, (len(labels),), generator=generator)
        alpha_bar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = torch.randn(images.shape, generator=generator)
        noisy = alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images
        loss = (transformer(noisy, timestep=t, class_labels=labels).sample - velocity).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 200 == 0:
            print(f"dit {step} loss {running:.4f} {time.time() - start:.0f}s", flush=True)
    transformer.load_state_dict(average.state_dict())
    transformer.eval()
    return pipe


@torch.no_grad()
def measure(pipe: DiTPipeline, count: int, steps: int = 20, ddim: bool = True) -> float:
    """Class accuracy of samples from `steps` of DDIM (or of the pipeline's own sampler)."""
    pipe.set_progress_bar_config(disable=True)
    labels = class_labels(-1, count)
    own = pipe.scheduler
    if ddim:
        pipe.scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    try:
        images = torch.cat([
            pipe(labels[i : i + 100], num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="pt",
                 generator=torch.Generator().manual_seed(i)).images
            for i in range(0, count, 100)
        ])  # fmt: skip
    finally:
        pipe.scheduler = own
    return digit_accuracy(images * 2 - 1, labels)
