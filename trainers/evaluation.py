"""What a method hands to `trainers.evaluate`, and how the command finds adapter and method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from checkpoints.load import known_methods
from checkpoints.manifest import AdapterError
from trainers.image_quality import mse, psnr_db, ssim
from trainers.report import QualityFn
from trainers.rows import Case


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
    """

    cases: Sequence[Case]
    inputs: Sequence[Any]
    seeds: Sequence[int]
    reference: Tensor
    reference_text: str
    quality: Mapping[str, QualityFn]
    timing_batch: int


IMAGE_QUALITY: dict[str, QualityFn] = {
    "psnr_db": lambda images, reference, inputs: psnr_db(images, reference),
    "mse": lambda images, reference, inputs: mse(images, reference),
    "ssim": lambda images, reference, inputs: ssim(images, reference),
}
"""Closeness to the reference, for every method that makes images."""


def method_module(method: str) -> ModuleType:
    """`trainers/<method>.py`, for a method of this checkout only: the name comes from a file that anyone may have made.

    Raises:
        AdapterError: no such method.
    """
    if method not in known_methods():
        raise AdapterError(f"the adapter's method is {method!r}, which is not one of {', '.join(known_methods())}")
    return importlib.import_module(f".{method}", __package__)
