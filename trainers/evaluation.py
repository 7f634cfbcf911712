"""What a method hands to `trainers.evaluate`, and how the command finds adapter and method."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import known_methods
from checkpoints.manifest import AdapterError, Manifest
from trainers.config import EvaluateConfig
from trainers.image_quality import mse, psnr_db, ssim
from trainers.report import QualityFn, measure_cases
from trainers.rows import Case, Row
from trainers.verdict import equal_latency_verdict


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        adapter: its folder.
        backbone: the name to load it by, the recipe's or the manifest's.
        notify: told what is being done.
    """

    adapter: Path
    manifest: Manifest
    backbone: str
    config: EvaluateConfig
    device: torch.device
    notify: Callable[[str], None]

    @property
    def revision(self) -> str | None:
        """Of the backbone: the manifest's, where it is the manifest's backbone that is loaded."""
        named = self.backbone == self.manifest.base_model_name_or_path
        return self.manifest.base_model_revision if named else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What measuring found.

    Attributes:
        rows: one of kind baseline, the adapter first among those of its kind, the rivals.
        verdict: what they say about the adapter, see `trainers.verdict`.
        facts: how it was measured and what else was found; kept in the report under these names.
        plotted: the quality or work that report.png draws.
        against: what it is drawn against, the speedup or a work.
    """

    rows: Sequence[Row]
    verdict: dict[str, Any] | None
    facts: dict[str, Any] = field(default_factory=dict)
    plotted: str = "psnr_db"
    against: str = "speedup"


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """What is measured and what it is compared with.

    Attributes:
        cases: one of kind baseline, one of kind adapter, the rivals.
        inputs, seeds: held out from training, one per image.
        reference: [N, C, H, W] in -1..1, the un-accelerated backbone's images of the same inputs and seeds.
        reference_text: what the reference is, in words, for the report.
        quality: by metric.
        timing_batch: images per timed call.
        left_out: what is not measured and why, a sentence each, for the report.
    """

    cases: Sequence[Case]
    inputs: Sequence[Any]
    seeds: Sequence[int]
    reference: Tensor
    reference_text: str
    quality: Mapping[str, QualityFn]
    timing_batch: int
    left_out: Sequence[str] = ()


IMAGE_QUALITY: dict[str, QualityFn] = {
    "psnr_db": lambda images, reference, inputs: psnr_db(images, reference),
    "mse": lambda images, reference, inputs: mse(images, reference),
    "ssim": lambda images, reference, inputs: ssim(images, reference),
}
"""Closeness to the reference, for every method that makes images."""


def device_of(wanted: str) -> torch.device:
    """`cpu`, `cuda`, or with `auto` a GPU if there is any.  Raises ValueError where there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("device is cuda but torch sees no GPU here: set device=cpu, or leave it out")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu")


def measurer(method: str) -> Callable[[Request], Measured]:
    """How adapters of a method are measured: its own `measure`, or the one that all diffusion pipelines share.

    Raises:
        AdapterError: no such method.
    """
    module = method_module(method)
    own: Callable[[Request], Measured] | None = getattr(module, "measure", None)
    return own or partial(measure_pipeline, module.evaluation_setup)


def measure_pipeline(setup_of: Callable[..., EvaluationSetup], request: Request) -> Measured:
    """Quality, executed work, time and memory of a diffusion pipeline's cases."""
    from modules.pipelines import driver, load_pipeline

    config, settings = request.config, request.config.evaluation
    pipe = load_pipeline(request.backbone, request.revision, config.dtype).to(request.device)
    running = driver(pipe, request.backbone)
    request.notify("reference images, and rivals at the adapter's work")
    setup = setup_of(running, request.adapter, config)
    rows = measure_cases(
        running,
        setup.cases,
        setup.inputs,
        setup.seeds,
        setup.reference,
        repeats=settings.repeats,
        batch_size=settings.batch_size,
        timing_batch=setup.timing_batch,
        quality_fns=setup.quality,
        seed=settings.seed,
        notify=request.notify,
    )
    facts = {
        "inputs": len(setup.inputs),
        "batch_size": settings.batch_size,
        "timing_batch": setup.timing_batch,
        "reference": setup.reference_text,
        "left_out": list(setup.left_out),
    }
    return Measured(rows=rows, verdict=equal_latency_verdict(rows), facts=facts)


def method_module(method: str) -> ModuleType:
    """`trainers/<method>.py`, for a method of this checkout only: the name comes from a file that anyone may have made.

    Raises:
        AdapterError: no such method.
    """
    if method not in known_methods():
        raise AdapterError(f"the adapter's method is {method!r}, which is not one of {', '.join(known_methods())}")
    return importlib.import_module(f".{method}", __package__)
