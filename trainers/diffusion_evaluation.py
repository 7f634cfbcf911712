"""What adapters of diffusion models are judged on: held-out inputs, reference images, quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from checkpoints.manifest import Manifest, check_valid_for
from data.inputs import accuracy_of, held_out_inputs
from data.stepped import derive_seed
from modules.pipelines import DiffusionDriver
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe, batches_of, reference_images
from trainers.evaluation import IMAGE_QUALITY, EvaluationSetup
from trainers.report import QualityFn
from trainers.rows import Case


@dataclass(frozen=True)
class Ground:
    """Inputs and the images that are asked for.

    Attributes:
        inputs, seeds: of N held-out images.
        reference: [N, C, H, W] in -1..1.  reference_text: what they are.
        quality: by name.
        probe: the first inputs, to try settings on and to time.
        call: what every case passes to the pipeline.
    """

    inputs: Sequence[Any]
    seeds: Sequence[int]
    reference: Tensor
    reference_text: str
    quality: dict[str, QualityFn]
    probe: Probe
    call: dict[str, Any]

    def setup(self, cases: list[Case], left_out: Sequence[str] = ()) -> EvaluationSetup:
        """The evaluation of these cases."""
        return EvaluationSetup(
            cases=cases,
            inputs=self.inputs,
            seeds=self.seeds,
            reference=self.reference,
            reference_text=self.reference_text,
            quality=self.quality,
            timing_batch=len(self.probe.inputs),
            left_out=list(left_out),
        )


def ground_of(driver: DiffusionDriver, manifest: Manifest, config: EvaluateConfig, steps: int) -> Ground:
    """What an adapter is judged on; the reference is the plain sampler with `steps` steps from the same noise.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    check_valid_for(manifest, driver.transformer)
    settings, name = config.evaluation, manifest.base_model_name_or_path
    inputs = held_out_inputs(name, settings.prompts, settings.seed, settings.inputs)
    seeds = [derive_seed(settings.seed, "image", i) for i in range(len(inputs))]
    call = {"guidance_scale": manifest.module["guidance"]}
    reference = reference_images(driver, inputs, seeds, steps, settings.batch_size, **call)
    timed = min(settings.timing_batch, len(inputs))
    probe = Probe(
        driver=driver,
        inputs=inputs[:timed],
        seeds=seeds[:timed],
        reference=reference[:timed],
        batches=batches_of(inputs, seeds, settings.batch_size),
    )
    quality: dict[str, QualityFn] = dict(IMAGE_QUALITY)
    if (accuracy := accuracy_of(name)) is not None:
        quality["accuracy"] = lambda images, _, asked: accuracy(images, list(asked))
    text = f"{steps} steps of {type(driver.pipe.scheduler).__name__} from the same noise"
    return Ground(inputs, seeds, reference, text, quality, probe, call)
