"""A driver calls the denoiser exactly as the pipeline does, and the pipeline exactly as a user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers import PixArtTransformer2DModel as Transformer
from torch import Tensor

from modules.pipelines import Conditions, DiffusionDriver, DiTDriver, PixArtDriver, driver, load_pipeline
from tests.tiny import tiny_dit_pipeline, tiny_pipeline, tiny_pixart_pipeline
from tests.tiny_ilf import CALL, GUIDANCE, INPUTS, SEEDS, latents_of_call, tiny_driver


def pixart_1024() -> PixArtAlphaPipeline:
    """PixArt-alpha at the size at which it is also told resolution and aspect ratio; one block, 256 tokens."""
    pipe = tiny_pixart_pipeline()
    torch.manual_seed(0)
    size = {"sample_size": 128, "patch_size": 8, "num_layers": 1, "attention_head_dim": 12, "cross_attention_dim": 24}
    large = Transformer(**{**pipe.transformer.config, **size, "use_additional_conditions": True})
    pipe.register_modules(transformer=large.eval().requires_grad_(False))
    return pipe


DRIVERS: dict[str, Any] = {
    "alpha": lambda: PixArtDriver(tiny_pixart_pipeline(), CALL["pixart"]),
    "sigma": lambda: PixArtDriver(tiny_pixart_pipeline(PixArtSigmaPipeline), CALL["pixart"]),
    "alpha 1024": lambda: PixArtDriver(pixart_1024(), CALL["pixart"]),
    "dit": lambda: DiTDriver(tiny_dit_pipeline(), CALL["dit"]),
}


def inputs_of(running: DiffusionDriver, count: int = 3) -> list[Any]:
    return INPUTS["dit" if isinstance(running, DiTDriver) else "pixart"][:count]


def recorded(running: DiffusionDriver, guidance: float, steps: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(guided output, timestep, latents) of every step of the pipeline's own call."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    scheduler, rows = running.pipe.scheduler, len(inputs_of(running))
    step = scheduler.step

    def listen(output: Tensor, timestep: Tensor, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((output[:rows], timestep, latents[:rows]))  # DiT keeps both halves
        return step(output, timestep, latents, *args, **kwargs)

    scheduler.step = listen
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    # Decoding is not looked at, and 1024 pixels of it cost time.
    if isinstance(running, PixArtDriver):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:rows]]
        running.pipe(inputs_of(running), generator=generators, output_type="latent", **running.call, **call)
    else:
        running.generate(inputs_of(running), SEEDS[:rows], **call)
    del scheduler.step
    return seen


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize("name", DRIVERS)
@torch.no_grad()
def test_the_guided_call_and_the_noise_are_the_pipelines_own_bit_for_bit(name: str, guidance: float) -> None:
    running: DiffusionDriver = DRIVERS[name]()
    seen = recorded(running, guidance)
    conditions = running.encode(inputs_of(running))
    for output, timestep, latents in seen:
        assert torch.equal(running.guided(latents, timestep, conditions, guidance), output)
    assert torch.equal(running.initial_noise(SEEDS[:3]), seen[0][2])


@pytest.mark.parametrize("kind", ["pixart", "dit"])
@torch.no_grad()
def test_a_bfloat16_driver_is_the_bfloat16_pipeline(kind: str) -> None:
    running = tiny_driver(kind)
    running.pipe.to(torch.bfloat16)
    seen = recorded(running, GUIDANCE)
    conditions = running.encode(inputs_of(running))
    assert torch.equal(running.initial_noise(SEEDS[:3]), seen[0][2]) and seen[0][2].dtype == torch.bfloat16
    for output, timestep, latents in seen:
        assert torch.equal(running.guided(latents, timestep, conditions, GUIDANCE), output)
        # States are kept in float32 while training.
        assert torch.equal(running.guided(latents.float(), timestep, conditions, GUIDANCE), output)


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_an_image_depends_on_its_input_and_seed_alone(kind: str) -> None:
    running, call = tiny_driver(kind), {"num_inference_steps": 3, "guidance_scale": GUIDANCE}
    inputs, seeds = INPUTS[kind], SEEDS
    together = running.generate(inputs, seeds, **call)
    assert together.shape == (4, 3, 16, 16) and together.min() >= -1 and together.max() <= 1
    assert torch.equal(running.generate(inputs, seeds, **call), together)
    order = [2, 0]
    apart = running.generate([inputs[i] for i in order], [seeds[i] for i in order], **call)
    torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-5)
    other = running.generate(inputs, [seed + 1 for seed in seeds], **call)
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(other, together, strict=True))


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_decoded_latents_are_the_images(kind: str) -> None:
    running, call = tiny_driver(kind), {"num_inference_steps": 2, "guidance_scale": GUIDANCE}
    running.pipe.vae.register_to_config(scaling_factor=0.18)
    latents = latents_of_call(running, INPUTS[kind], SEEDS, **call)
    images = running.generate(INPUTS[kind], SEEDS, **call)
    torch.testing.assert_close(running.decode(latents), images, rtol=0, atol=1e-5)
    assert running.latents_of(images).shape == latents.shape


def test_conditions_are_selected_and_dropped_row_by_row() -> None:
    asked, nothing = torch.arange(12).view(4, 3), torch.full((4, 3), -1)
    conditions = Conditions({"x": asked}, {"x": nothing})
    assert len(conditions) == 4
    assert torch.equal(conditions.select(torch.tensor([2, 2])).asked["x"], asked[[2, 2]])
    dropped = conditions.drop(torch.tensor([True, False, False, True]))
    assert torch.equal(dropped.asked["x"], torch.stack([nothing[0], asked[1], asked[2], nothing[3]]))
    assert torch.equal(dropped.nothing["x"], nothing)


# Loading.


def refusal(name: str) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_pipeline(name)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message.replace(name, "")
    return message


def test_an_unknown_embedded_backbone_is_refused_with_the_known_ones(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("modules.embedded.EMBEDDED_FOLDER", tmp_path)
    assert refusal("embedded:pixrt") == "backbone.name is 'embedded:pixrt', but the embedded pipelines are none"
    for name in ("pixart", "dit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert refusal("embedded:pixrt").endswith("the embedded pipelines are dit, pixart")


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"the folder '{tmp_path}' holds no pipeline: it has no model_index.json"


def test_a_pipeline_that_nobody_drives_is_refused() -> None:
    pipe = DDIMPipeline(unet=None, scheduler=DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="the pipeline is a DDIMPipeline, and only DiTPipeline, FluxPipeline, PixArtA"):
        driver(pipe)


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_what_is_loaded_is_frozen_and_the_same(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        loaded = load_pipeline(str(tmp_path), dtype=dtype)
        mine, theirs = loaded.transformer.state_dict(), pipe.transformer.state_dict()
        assert all(torch.equal(mine[name], value.to(getattr(torch, dtype))) for name, value in theirs.items())
        assert not loaded.transformer.training and not loaded.vae.training
        assert not any(p.requires_grad for part in (loaded.transformer, loaded.vae) for p in part.parameters())
