"""What an ILF adapter is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.load import read_tensors
from checkpoints.manifest import read_manifest
from modules.ilf import ILFHandle, attach
from modules.pipelines import DiffusionDriver
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import adapter_case, standard_cases
from trainers.diffusion_evaluation import ground_of
from trainers.evaluation import EvaluationSetup
from trainers.rows import Case

REFERENCE_STEPS, FULL_STEPS = 50, 20


def evaluation_setup(driver: DiffusionDriver, adapter: Path, config: EvaluateConfig) -> EvaluationSetup:
    """The 20-step baseline, the adapter with and without its loop, plain samplers, and the untrained members.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    manifest, tensors = read_manifest(adapter), read_tensors(adapter)
    ground, rivals = ground_of(driver, manifest, config, REFERENCE_STEPS), config.evaluation.rivals
    steps = len(manifest.module["timesteps"])
    own = adapter_case(f"ILF, {steps} steps", lambda: attach(driver.pipe, manifest, tensors), _loops)
    cases = standard_cases(own, ground.probe, full_steps=FULL_STEPS, rivals=rivals, **ground.call)
    if rivals != "none" and manifest.module["solver"] is not None:
        cases.insert(2, _without_loop(driver, lambda: attach(driver.pipe, manifest, tensors), steps))
    return ground.setup(cases)


def _loops(handle: Any) -> list[Any]:
    return [handle.module.feedback] if isinstance(handle, ILFHandle) else []


def _without_loop(driver: DiffusionDriver, make: Any, steps: int) -> Case:
    """What the loop itself adds: the adapter's own solver on the plain backbone."""

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with make() as handle, handle.bypassed():
            yield handle.call_kwargs

    return Case(name=f"its solver without the loop, {steps} steps", kind="peer", enter=enter)
