"""The embedded `pixart`: a PixArt-alpha pipeline whose text encoder is trained along with the transformer."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from data.scenes import caption_accuracy, captions, scene_batch, vocabulary

MAX_TOKENS = 16
GUIDANCE = 2.5
CALL = {
    "guidance_scale": GUIDANCE,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": MAX_TOKENS,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how wide; the defaults made the shipped backbone."""

    steps: int = 12_000
    batch_size: int = 64
    width: int = 128
    layers: int = 10
    lr: float = 1.2e-3
    warmup: int = 300
    ema: float = 0.9985
    drop_caption: float = 0.1


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions, with T5's special tokens in T5's places."""
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def build_pipeline(vae: AutoencoderKL, recipe: Recipe) -> PixArtAlphaPipeline:
    """An untrained pipeline around a trained autoencoder."""
    tokenizer = word_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=recipe.width, d_kv=32, d_ff=2 * recipe.width, num_layers=2,
            num_heads=recipe.width // 32, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )
    )  # fmt: skip
    transformer = PixArtTransformer2DModel(
        num_attention_heads=recipe.width // 32, attention_head_dim=32, in_channels=4, out_channels=4,
        num_layers=recipe.layers, cross_attention_dim=recipe.width, caption_channels=recipe.width,
        sample_size=8, patch_size=2, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    return PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def _loss(pipe: PixArtAlphaPipeline, latents: Tensor, texts: list[str], generator: torch.Generator) -> Tensor:
    """Mean squared error of v, with timesteps drawn more often where scenes are composed (high noise)."""
    tokens = pipe.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    text = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    uniform = torch.rand(len(texts), generator=generator)
    t = (1000 * uniform.pow(0.8)).long().clamp(0, 999)
    alpha_bar = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    out = pipe.transformer(
        noisy, encoder_hidden_states=text, encoder_attention_mask=tokens.attention_mask, timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip
    return (out - velocity).pow(2).mean()


def train_pixart(vae: AutoencoderKL, recipe: Recipe, out: Path | None = None) -> PixArtAlphaPipeline:
    """Trains transformer and text encoder together; returns the pipeline with its averaged weights."""
    torch.manual_seed(0)
    pipe = build_pipeline(vae, recipe)
    learned = nn.ModuleList([pipe.transformer, pipe.text_encoder]).train()
    average = copy.deepcopy(learned).requires_grad_(False)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        late = max(0.0, (step - 0.3 * recipe.steps) / (0.7 * recipe.steps))
        return min(1.0, (step + 1) / recipe.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    start, running = time.time(), 0.0
    for step in range(recipe.steps):
        images, texts = scene_batch(step, recipe.batch_size)
        keep = torch.rand(len(texts), generator=generator) >= recipe.drop_caption
        texts = [text if kept else "" for text, kept in zip(texts, keep.tolist(), strict=True)]
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        loss = _loss(pipe, latents, texts, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(learned.parameters()), 1 - decay)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 200 == 0:
            print(f"pixart {step} loss {running:.4f} {time.time() - start:.0f}s", flush=True)
        if out is not None and step and step % 2000 == 0:
            trained = copy.deepcopy(learned.state_dict())
            learned.load_state_dict(average.state_dict())
            print(f"pixart {step} captions {measure(pipe, 128):.3f}", flush=True)
            pipe.save_pretrained(out)
            learned.load_state_dict(trained)
            learned.train()
    learned.load_state_dict(average.state_dict())
    learned.eval()
    return pipe


@torch.no_grad()
def measure(pipe: PixArtAlphaPipeline, count: int, steps: int = 20) -> float:
    """Caption accuracy on held-out prompts, every attribute at once."""
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    texts = captions(-1, count)
    images = [
        pipe(texts[i : i + 64], num_inference_steps=steps, output_type="pt",
             generator=torch.Generator().manual_seed(i), **CALL).images
        for i in range(0, count, 64)
    ]  # fmt: skip
    return caption_accuracy(torch.cat(images) * 2 - 1, texts)
