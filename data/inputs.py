"""What a backbone is asked for: prompts or class labels, for training and held out, and how their images are judged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

Accuracy = Callable[[Tensor, list[Any]], float]

# Seeds of inputs are offsets into disjoint ranges: nothing held out is ever trained on.
_TRAINING, _HELD_OUT = 10_000_000, 20_000_000


def training_inputs(backbone: str, prompts: str | None, seed: int, count: int) -> list[Any]:
    """`count` inputs to train on, a function of `seed` alone.

    Args:
        backbone: `embedded:<name>`, a folder or a Hub id.
        prompts: a text file with one prompt a line; None draws the backbone's own inputs.
    Raises:
        ValueError: the file is missing or too short, or this backbone needs one.
    """
    return _inputs(backbone, prompts, _TRAINING + seed, count)


def held_out_inputs(backbone: str, prompts: str | None, seed: int, count: int) -> list[Any]:
    """`count` inputs to judge by; see `training_inputs`.  Of a prompt file these are the last lines."""
    return _inputs(backbone, prompts, _HELD_OUT + seed, count)


def accuracy_of(backbone: str) -> Accuracy | None:
    """How images [B, C, H, W] in -1..1 are checked against their inputs, where code can tell."""
    if backbone == "embedded:pixart":
        from data.scenes import caption_accuracy

        return caption_accuracy
    if backbone == "embedded:dit":
        from data.digits import digit_accuracy

        return digit_accuracy
    return None


def _inputs(backbone: str, prompts: str | None, seed: int, count: int) -> list[Any]:
    if prompts is not None:
        return _from_file(Path(prompts), seed, count)
    if backbone == "embedded:pixart":
        from data.scenes import captions

        return list(captions(seed, count))
    if backbone == "embedded:dit":
        from data.digits import class_labels

        return list(class_labels(seed, count))
    if "dit" in backbone.lower():
        return [random.Random(f"{seed} {i}").randrange(1000) for i in range(count)]
    raise ValueError(f"backbone {backbone} needs data.prompts: a text file with one prompt a line")


def _from_file(path: Path, seed: int, count: int) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"data.prompts is {path}, and there is no such file: give a text file with one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.prompts {path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from error
    held_out = max(1, len(lines) // 10)
    part = lines[-held_out:] if seed >= _HELD_OUT else lines[:-held_out]
    if not part:
        raise ValueError(f"{path} has {len(lines)} prompts: at least 2 are needed, the last tenth is held out")
    return [part[i] for i in (random.Random(seed).randrange(len(part)) for _ in range(count))]
