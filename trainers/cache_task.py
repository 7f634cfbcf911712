"""What the tasks of learned caches share: the pipeline they train for, judging by its full run, and the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.manifest import describe, fingerprint
from data.inputs import held_out_inputs, training_inputs
from data.stepped import derive_seed
from data.trajectories import Trajectories, record_trajectories
from modules.guards import sampler_entry
from modules.learned_cache import CacheHandle, Sampling
from modules.pipelines import DiffusionDriver, driver, load_pipeline
from modules.sites import block_stack
from trainers.adapters import write_task_adapter
from trainers.base import FrozenBackboneTask
from trainers.config import RecipeBase
from trainers.devices import training_device
from trainers.image_quality import psnr_db

HELD_OUT = 16


def load_driver(recipe: RecipeBase) -> DiffusionDriver:
    """The recipe's frozen pipeline, where this process trains: recording happens before Lightning moves anything."""
    pipe = load_pipeline(recipe.backbone.name, recipe.backbone.revision, recipe.backbone.dtype)
    return driver(pipe.to(training_device(recipe)), recipe.backbone.name)


def sampling_of(running: DiffusionDriver, steps: int, guidance: float) -> Sampling:
    """The pipeline's own sampler at `steps` steps."""
    return Sampling(
        timesteps=[int(t) for t in running.sampler(steps).timesteps.tolist()],
        guidance=guidance,
        sampler=sampler_entry(running.pipe.scheduler, True),
        call=running.call,
    )


def own_runs(
    recipe: RecipeBase,
    running: DiffusionDriver,
    prompts: str | None,
    count: int,
    sampling: Sampling,
    keep: Sequence[int] | None = None,
) -> Trajectories:
    """Recorded full runs on the recipe's training inputs.

    Raises:
        ValueError: the sampler takes another number of calls than steps, or other timesteps than integers.
    """
    inputs = training_inputs(recipe.backbone.name, prompts, recipe.seed, count)
    seeds = [derive_seed(recipe.seed, "trajectory", i) for i in range(count)]
    return record_trajectories(
        running, inputs, seeds, steps=len(sampling.timesteps), guidance=sampling.guidance, keep=keep, notify=print
    )


class CacheTask(FrozenBackboneTask):
    """A frozen pipeline and what decides about, or stands in for, parts of its work.

    Attributes:
        running: the driver of the pipeline.  sampling: what it is trained for.
    """

    def __init__(
        self, recipe: RecipeBase, running: DiffusionDriver, learned: nn.Module, sampling: Sampling, prompts: str | None
    ) -> None:
        super().__init__(running.transformer, learned, recipe)
        self.running, self.sampling_point, self.prompts = running, sampling, prompts
        # Taken while this process holds the whole backbone, which a strategy may shard.
        self.identity = (fingerprint(running.transformer), describe(running.transformer))
        self._judge: tuple[list[Any], list[int], Tensor] | None = None

    # What a method supplies.

    def attach_exported(self) -> CacheHandle:
        """What `exported` is for a user: attached to the pipeline."""
        raise NotImplementedError

    def module_entry_now(self) -> dict[str, Any]:
        """The module's config as the manifest holds it."""
        raise NotImplementedError

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name."""
        return {name: value.detach().cpu().contiguous() for name, value in self.exported.state_dict().items()}

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Takes away what a method keeps attached while it trains."""
        yield

    def runs_past_hooks(self) -> Sequence[nn.Module]:
        """The first block, whose time embedding diffusers' DiT calls from outside the block."""
        return [block_stack(self.running.transformer).blocks[0]]

    # Sampling and export.

    def _judged_by(self) -> tuple[list[Any], list[int], Tensor]:
        """Held-out inputs and seeds, and the full run's images from the same noise; made once."""
        if self._judge is None:
            inputs = held_out_inputs(self.recipe.backbone.name, self.prompts, self.recipe.seed + 1, HELD_OUT)
            seeds = [derive_seed(self.recipe.seed, "held out", i) for i in range(HELD_OUT)]
            call = {"num_inference_steps": len(self.sampling_point.timesteps)}
            with self.without_hooks():
                full = self.running.generate(inputs, seeds, guidance_scale=self.sampling_point.guidance, **call)
            self._judge = (inputs, seeds, full)
        return self._judge

    def _student(self, inputs: list[Any], seeds: list[int]) -> Tensor:
        with self.consolidated(), self.without_hooks(), self.attach_exported() as handle:
            return self.running.generate(inputs, seeds, **handle.call_kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `sample_every` updates: PSNR of the student on held-out inputs."""
        every = self.recipe.trainer.sample_every
        if every and self.steps_done % every == 0:
            inputs, seeds, full = self._judged_by()
            self.note(held_out_psnr_db=torch.tensor(psnr_db(self._student(inputs, seeds), full)))

    def sample_images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """(full run's, student's) images from the same noise."""
        inputs, seeds, full = self._judged_by()
        return full[:count], self._student(inputs[:count], seeds[:count])

    def adapter_target(self) -> Any:
        """The pipeline."""
        return self.running.pipe

    def export_adapter(self, folder: Path) -> None:
        """Manifest, tensors and card."""
        write_task_adapter(
            self,
            folder,
            self.module_entry_now(),
            self.adapter_tensors(),
            valid_for={"dtype": [self.recipe.backbone.dtype]},
            call=self.sampling_point.call,
        )
