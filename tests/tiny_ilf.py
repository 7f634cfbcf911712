"""ILF on the tiny pipelines: configs, modules that do something, saved backbones, recipes that train in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.manifest import Manifest, describe, fingerprint
from modules import pipelines
from modules.guards import sampler_entry
from modules.ilf import ILFConfig, ILFModule, module_entry
from modules.pipelines import DiffusionDriver, DiTDriver, PixArtDriver
from modules.solvers import dpm_solver_table
from tests.tiny import PIXART_CALL, tiny_pipeline
from trainers import recipes

DEPTH, GUIDANCE = 4, 3.0
CALL: dict[str, dict[str, Any]] = {
    "dit": {},
    "pixart": {"use_resolution_binning": False, "max_sequence_length": PIXART_CALL["max_sequence_length"]},
}
INPUTS: dict[str, list[Any]] = {
    "dit": [3, 7, 1, 999],
    "pixart": ["a red circle", "a blue square on grey", "green", "a grey circle on red"],
}
SEEDS = [11, 12, 13, 14]
RECIPE = Path(__file__).with_name("ilf_tiny.yaml")


def tiny_driver(kind: str, layers: int = DEPTH) -> DiffusionDriver:
    """The driver of a fresh tiny pipeline."""
    return driver_of(tiny_pipeline(kind, layers), kind)


def driver_of(pipe: Any, kind: str) -> DiffusionDriver:
    """The driver of a tiny pipeline, with the call arguments that one needs."""
    return (DiTDriver if kind == "dit" else PixArtDriver)(pipe, CALL[kind])


def timesteps_of(pipe: Any, steps: int) -> list[int]:
    """The timesteps that the pipeline's scheduler takes by itself."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def ilf_config(pipe: Any, feedback: Sequence[bool] = (True, False, True, True), **changes: Any) -> ILFConfig:
    """A config for a tiny pipeline and its own scheduler: blocks 1 and 2 loop."""
    values: dict[str, Any] = {
        "span_start": 1,
        "span_len": 2,
        "feedback": list(feedback),
        "timesteps": timesteps_of(pipe, len(feedback)),
        "guidance": GUIDANCE,
        "sampler": sampler_entry(pipe.scheduler, True),
    }
    return ILFConfig(**{**values, **changes})


def solver_entry(pipe: Any, steps: int, seed: int = 0) -> dict[str, Any]:
    """A solver like DPM-Solver++ whose numbers are nobody else's."""
    table = module_entry(
        dpm_solver_table(
            timesteps_of(pipe, steps), pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type
        )
    )
    generator = torch.Generator().manual_seed(seed)
    table["state"] = [value + 0.01 * torch.randn((), generator=generator).item() for value in table["state"]]
    table["data"] = [[value + 0.01 * torch.randn((), generator=generator).item() for value in r] for r in table["data"]]
    return table


def noisy_module(config: ILFConfig, transformer: nn.Module, strength: float = 0.3, seed: int = 5) -> ILFModule:
    """A module far from its start: random strengths, a feedback block that is nobody's copy."""
    module = ILFModule(config, transformer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.feedback.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        module.scale.copy_(strength * torch.randn(module.scale.shape, generator=generator))
    return module.requires_grad_(False).eval()


def manifest_of(module: ILFModule, transformer: nn.Module, name: str = "tiny") -> Manifest:
    """The manifest of a module's adapter."""
    return Manifest(
        method="ilf",
        module=module_entry(module.config),
        base_model_name_or_path=name,
        base_model_fingerprint=fingerprint(transformer),
        base_model_config=describe(transformer),
        valid_for={"dtype": ["float32"]},
        call=module.config.call,
    )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as `write_adapter` takes them."""
    return {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}


def latents_of_call(driver: DiffusionDriver, inputs: list[Any], seeds: list[int], **call: Any) -> Tensor:
    """Final latents of the pipeline's own call, caught where they are decoded (DiT's call returns none)."""
    seen: list[Tensor] = []
    vae = driver.pipe.vae
    decode = vae.decode
    vae.decode = lambda latents, *args, **kwargs: seen.append(latents) or decode(latents, *args, **kwargs)
    try:
        driver.generate(inputs, seeds, **{"guidance_scale": GUIDANCE, **call})
    finally:
        del vae.decode
    return seen[0] * vae.config.scaling_factor


def hooked(pipe: Any) -> list[str]:
    """What anybody left on the pipeline: hooks, overridden forwards, replaced scheduler methods."""
    found = [
        name
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "_diffusers_hook") or "forward" in vars(module) or module._forward_hooks
    ]
    return found + [name for name in ("step", "set_timesteps") if name in vars(pipe.scheduler)]


def save_tiny(kind: str, folder: Path, monkeypatch: Any = None, layers: int = DEPTH) -> str:
    """Saves a tiny pipeline as `<folder>/tiny_<kind>` and returns that name; its call arguments become known."""
    name = str(folder / f"tiny_{kind}")
    if not Path(name).is_dir():
        tiny_pipeline(kind, layers).save_pretrained(name)
        (folder / "prompts.txt").write_text("\n".join(INPUTS["pixart"] * 5))
    if monkeypatch is not None:
        monkeypatch.setitem(pipelines._EMBEDDED_CALL, name, CALL[kind])
    return name


LEARNED_SOLVER = {"module.solver": "learned", "objective.rollout": "true"}


def tiny_recipe(name: str, **changes: str) -> Any:
    """A recipe that trains on a saved tiny backbone in about a second; keys are written with __ for dots."""
    prompts = {} if "dit" in name else {"data.prompts": str(Path(name).parent / "prompts.txt")}
    own = {key.replace("__", "."): value for key, value in changes.items()}
    return recipes.compose_recipe(str(RECIPE), {"backbone.name": name, **prompts, **own})
