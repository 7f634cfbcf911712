"""Learning-to-Cache's released routers become an adapter (arXiv:2406.01733, github.com/horseee/learning-to-cache)."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from checkpoints.card import card
from checkpoints.manifest import Manifest, describe, fingerprint
from checkpoints.save import write_adapter
from modules.guards import sampler_entry
from modules.harmonica import HarmoniCaConfig, module_entry, reuse_ratio
from modules.pipelines import driver, load_pipeline
from modules.sites import block_stack
from trainers.config import ConvertConfig
from trainers.run_folder import versions

TAU, GUIDANCE = 0.1, 1.5
"""The threshold and the guidance that the authors report with."""


@dataclass(frozen=True)
class ReleasedRouters:
    """What such a file holds.

    Attributes:
        logits: [T, N] in sampling order; N is attention and feed-forward of each block in turn.
        settings: their training's arguments.
    """

    logits: Tensor
    settings: dict[str, Any]

    @property
    def routed(self) -> list[int]:
        """The steps that were trained: every second one from the second on."""
        return list(range(1, len(self.logits), 2))

    def mask(self, tau: float = TAU) -> Tensor:
        """What is computed, bool [T, N]; rows that were not trained hold noise, and all of theirs is computed."""
        mask = torch.ones_like(self.logits, dtype=torch.bool)
        mask[self.routed] = self.logits[self.routed].sigmoid() > tau
        return mask


def read_routers(path: Path) -> ReleasedRouters:
    """Reads one file without running anything in it: tensors and their training's arguments, nothing else is unpickled.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    if not path.is_file():
        raise ValueError(f"source is {path}, and there is no such file: give one of the released DiT/ckpt/*_router.pt")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a file that torch.save wrote: give one of the released DiT/ckpt/*_router.pt")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} holds more than tensors and arguments, and is not opened: {reason}") from error
    rows = content.get("routers") if isinstance(content, dict) else None
    if not isinstance(rows, dict) or set(rows) != {f"{i}.prob" for i in range(len(rows))} or len(rows) < 2:
        found = sorted(content)[:3] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}, and a file of routers has 'routers' with 0.prob, 1.prob and so on")
    # Theirs count from the last denoising step.
    logits = torch.stack([rows[f"{i}.prob"].float() for i in reversed(range(len(rows)))])
    return ReleasedRouters(logits, dict(vars(content["args"])) if "args" in content else {})


def convert(config: ConvertConfig) -> None:
    """Write the adapter.  It is for DDIM at evenly spread timesteps, last and first included, as they sampled.

    Raises:
        ValueError: the file is refused, or is not for a backbone of this size.
    """
    released = read_routers(Path(config.source))
    backbone = config.backbone
    running = driver(load_pipeline(backbone.name, backbone.revision, backbone.dtype), backbone.name)
    stack = block_stack(running.transformer)
    units = [f"{name}.{part}" for i, name in enumerate(stack.names) for part in stack.submodules(i)]
    steps, width = released.logits.shape
    if width != len(units):
        raise ValueError(
            f"{config.source} routes {width} sub-modules but {backbone.name} has {len(units)}: give the backbone that "
            f"it was trained on{', ' + released.settings['model'] if 'model' in released.settings else ''}"
        )
    scheduler = DDIMScheduler.from_config(running.pipe.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    cache = HarmoniCaConfig(
        units=units,
        routed=released.routed,
        timesteps=[int(t) for t in scheduler.timesteps.tolist()],
        guidance=GUIDANCE,
        tau=TAU,
        sampler=sampler_entry(scheduler, True),
        call=running.call,
    )
    mask = released.mask()
    made = {"converted_from": config.source, "settings": released.settings, "versions": versions()}
    manifest = Manifest(
        method="harmonica",
        module=module_entry(cache),
        base_model_name_or_path=backbone.name,
        base_model_revision=backbone.revision,
        base_model_fingerprint=fingerprint(running.transformer),
        base_model_config=describe(running.transformer),
        valid_for={"dtype": [backbone.dtype]},
        made_by=made,
        call=running.call,
    )
    tensors = {"router.logits": released.logits[released.routed].contiguous(), "router.masks": mask[None]}
    write_adapter(Path(config.output), manifest, tensors, card(manifest, None))
    print(f"{steps} steps, {reuse_ratio(mask):.2%} of the sub-module calls are reused at tau {TAU:g}")
