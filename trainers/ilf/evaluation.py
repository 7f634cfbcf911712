"""What an ILF adapter is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.load import read_tensors
from checkpoints.manifest import check_valid_for, read_manifest
from data.inputs import accuracy_of, held_out_inputs
from data.stepped import derive_seed
from modules.ilf import ILFHandle, attach
from modules.pipelines import DiffusionDriver
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe, adapter_case, batches_of, reference_images, standard_cases
from trainers.evaluation import IMAGE_QUALITY, EvaluationSetup
from trainers.report import QualityFn
from trainers.rows import Case

REFERENCE_STEPS, FULL_STEPS = 50, 20


def evaluation_setup(driver: DiffusionDriver, adapter: Path, config: EvaluateConfig) -> EvaluationSetup:
    """The 20-step baseline, the adapter with and without its loop, plain samplers, and the untrained members.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    manifest, tensors = read_manifest(adapter), read_tensors(adapter)
    check_valid_for(manifest, driver.transformer)
    settings, name = config.evaluation, manifest.base_model_name_or_path
    inputs = held_out_inputs(name, settings.prompts, settings.seed, settings.inputs)
    seeds = [derive_seed(settings.seed, "image", i) for i in range(len(inputs))]
    guidance = {"guidance_scale": manifest.module["guidance"]}
    reference = reference_images(driver, inputs, seeds, REFERENCE_STEPS, settings.batch_size, **guidance)
    timed = min(settings.timing_batch, len(inputs))
    probe = Probe(
        driver=driver,
        inputs=inputs[:timed],
        seeds=seeds[:timed],
        reference=reference[:timed],
        batches=batches_of(inputs, seeds, settings.batch_size),
    )
    steps = len(manifest.module["timesteps"])
    own = adapter_case(f"ILF, {steps} steps", lambda: attach(driver.pipe, manifest, tensors), _loops)
    cases = standard_cases(own, probe, full_steps=FULL_STEPS, rivals=settings.rivals, **guidance)
    if settings.rivals != "none" and manifest.module["solver"] is not None:
        cases.insert(2, _without_loop(driver, lambda: attach(driver.pipe, manifest, tensors), steps))
    quality: dict[str, QualityFn] = dict(IMAGE_QUALITY)
    if (accuracy := accuracy_of(name)) is not None:
        quality["accuracy"] = lambda images, _, asked: accuracy(images, list(asked))
    text = f"{REFERENCE_STEPS} steps of {type(driver.pipe.scheduler).__name__} from the same noise"
    return EvaluationSetup(
        cases=cases,
        inputs=inputs,
        seeds=seeds,
        reference=reference,
        reference_text=text,
        quality=quality,
        timing_batch=timed,
    )


def _loops(handle: Any) -> list[Any]:
    return [handle.module.feedback] if isinstance(handle, ILFHandle) else []


def _without_loop(driver: DiffusionDriver, make: Any, steps: int) -> Case:
    """What the loop itself adds: the adapter's own solver on the plain backbone."""

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with make() as handle, handle.bypassed():
            yield handle.call_kwargs

    return Case(name=f"its solver without the loop, {steps} steps", kind="peer", enter=enter)
