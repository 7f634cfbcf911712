"""From a trained pipeline to the folder that ships: small weights, measured numbers, a card and a sample grid."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from data.digits import classifier_accuracy
from data.scenes import captions, scene_batch
from trainers.backbones import dit, pixart
from trainers.backbones.autoencoder import reconstruction_error, train_autoencoder
from trainers.plots import save_grid

AUTOENCODER_STEPS = 3000
MEASURED = 512


def publish_pixart(out: Path) -> None:
    """Trains autoencoder, text encoder and transformer, and writes the pipeline."""
    vae = train_autoencoder(AUTOENCODER_STEPS)
    write_pixart(pixart.train_pixart(vae, pixart.Recipe()), out)


def publish_dit(out: Path) -> None:
    """Trains the transformer on digits and writes the pipeline."""
    write_dit(dit.train_dit(dit.Recipe()), out)


def write_pixart(pipe: DiffusionPipeline, out: Path) -> None:
    """The shipped folder of a trained `pixart`; its numbers are those of the weights as written."""
    pipe = _written(pipe, out)
    accuracy = {steps: pixart.measure(pipe, MEASURED, steps) for steps in (20, 50)}
    vae: AutoencoderKL = pipe.vae
    lines = {
        "caption accuracy, 20 DPM-Solver++ steps": f"{accuracy[20]:.1%}",
        "caption accuracy, 50 DPM-Solver++ steps": f"{accuracy[50]:.1%}",
        "guidance": pixart.GUIDANCE,
        "held-out captions": MEASURED,
        "autoencoder mean squared error (images in -1..1)": f"{reconstruction_error(vae, scene_batch(7, 256)[0]):.5f}",
    }
    text = (
        "Captioned scenes of one or two shapes at 32x32, drawn by `data/scenes.py`. A caption counts as right only if "
        "shape, colour, size, place or relation, and background are all read back by the analytic checker."
    )
    _write_card(out, "pixart", text, lines, pipe)
    prompts = captions(-3, 32)
    images = torch.cat([_draw(pipe, prompts[i : i + 8], i, **pixart.CALL) for i in range(0, 32, 8)])
    save_grid(out / "samples.png", list(images.split(8)), [""] * 4)


def write_dit(pipe: DiffusionPipeline, out: Path) -> None:
    """The shipped folder of a trained `dit`; its numbers are those of the weights as written."""
    pipe = _written(pipe, out)
    lines = {
        "class accuracy, 20 DDIM steps": f"{dit.measure(pipe, MEASURED):.1%}",
        "class accuracy, 20 DPM-Solver++ steps": f"{dit.measure(pipe, MEASURED, ddim=False):.1%}",
        "guidance": dit.GUIDANCE,
        "samples": MEASURED,
        "the classifier's accuracy on held-out real digits": f"{classifier_accuracy():.1%}",
    }
    text = "Handwritten digits at 8x8 (scikit-learn's, UCI), class-conditional; the latent is the image itself."
    _write_card(out, "dit", text, lines, pipe)
    images = torch.cat([_draw(pipe, list(range(10)), i, guidance_scale=dit.GUIDANCE) for i in range(4)])
    save_grid(out / "samples.png", list(images.split(10)), [""] * 4)


def _written(pipe: DiffusionPipeline, out: Path) -> DiffusionPipeline:
    """Weights rounded to half precision on disk (they halve the repository), read back as everyone reads them."""
    for name in ("transformer", "vae"):
        getattr(pipe, name).half()
    pipe.save_pretrained(out)
    loaded = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _draw(pipe: DiffusionPipeline, inputs: list[Any], seed: int, **call: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(inputs))]
    return pipe(inputs, num_inference_steps=20, generator=generators, output_type="pt", **call).images * 2 - 1


def _write_card(out: Path, name: str, text: str, lines: dict[str, Any], pipe: DiffusionPipeline) -> None:
    transformer = pipe.transformer
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    rows = "\n".join(f"| {key} | {value} |" for key, value in lines.items())
    card = f"""---
license: apache-2.0
library_name: diffusers
---
# embedded:{name}

{text} {len(transformer.transformer_blocks)} blocks, {parameters:,} parameters in the transformer.

| | |
|---|---|
{rows}

Remade by `python -m trainers.backbones {name} out=FOLDER` (two CPU cores, an hour at most); these weights and numbers
come from torch {torch.__version__} on {platform.machine()}.

![samples](samples.png)
"""
    (out / "README.md").write_text(card, encoding="utf-8")
