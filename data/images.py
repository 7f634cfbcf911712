"""Latents of a real image set, for methods that learn from images rather than from the backbone's own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.pipelines import Conditions, DiffusionDriver, DiTDriver


def image_latents(driver: DiffusionDriver, source: str, limit: int, batch_size: int = 16) -> tuple[Tensor, Conditions]:
    """The first `limit` images of a data set, encoded by the backbone's autoencoder, with their conditions.

    Args:
        source: a folder in one of the layouts that `datasets` loads (images with a metadata.csv or metadata.jsonl, or
            Parquet files), or a Hub id.  Columns: `image`, and `label` for a class-conditional backbone, else `text`,
            `caption` or `prompt`.
    Returns:
        latents [N, C, H, W], and N conditions.
    Raises:
        ValueError: no such folder, no images, or no column to condition on.
    """
    rows = _load(source)
    columns = rows.column_names
    if "image" not in columns:
        raise ValueError(f"data.path {source} has the columns {', '.join(columns)} but needs one named image")
    wanted = ("label",) if isinstance(driver, DiTDriver) else ("text", "caption", "prompt")
    named = [name for name in wanted if name in columns]
    if not named:
        missing = " or ".join([", ".join(wanted[:-1]), wanted[-1]]) if wanted[1:] else wanted[0]
        raise ValueError(f"data.path {source} has the columns {', '.join(columns)}: {missing} is missing")
    rows = rows.select(range(min(limit, len(rows))))
    pixels = driver.latent_shape[1] * _scale(driver)
    parts, asked = [], []
    for start in range(0, len(rows), batch_size):
        batch = _decoded(rows, slice(start, min(start + batch_size, len(rows))), source)
        images = torch.stack([_tensor(image, pixels, _channels(driver)) for image in batch["image"]])
        parts.append(driver.latents_of(images.to(driver.device, driver.dtype)).float())
        asked += list(batch[named[0]])
    return torch.cat(parts), driver.encode(asked)


def _load(source: str) -> Any:
    from datasets import load_dataset

    folder = Path(source)
    try:
        if folder.is_dir():
            kind = "parquet" if any(folder.rglob("*.parquet")) else "imagefolder"
            return load_dataset(kind, data_dir=str(folder), split="train")
        return load_dataset(source, split="train")
    except Exception as error:  # datasets raises its own classes, OSError, ValueError and more for what cannot be read
        reason = " ".join(str(error).split())
        raise ValueError(f"data.path {source} is no image folder and no data set that can be read: {reason}") from error


def _decoded(rows: Any, part: slice, source: str) -> Any:
    """The columns of some rows; an image that cannot be decoded is named."""
    try:
        return rows[part]
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for a damaged file
        from datasets import Image

        paths = rows.cast_column("image", Image(decode=False))
        for number in range(part.start, part.stop):
            try:
                rows[number]
            except (OSError, SyntaxError, ValueError) as damaged:
                name = paths[number]["image"]["path"] or f"image {number}"
                raise ValueError(f"{name} of data.path {source} cannot be read ({damaged}): replace it") from damaged
        raise ValueError(f"data.path {source} cannot be read: {error}") from error


def _scale(driver: DiffusionDriver) -> int:
    return int(2 ** (len(driver.pipe.vae.config.block_out_channels) - 1)) if _is_deep(driver) else 1


def _is_deep(driver: DiffusionDriver) -> bool:
    return hasattr(driver.pipe.vae.config, "block_out_channels")


def _channels(driver: DiffusionDriver) -> int:
    return int(driver.pipe.vae.config.in_channels)


def _tensor(image: Any, pixels: int, channels: int) -> Tensor:
    """The central square of a PIL image, resized, in -1..1: [channels, pixels, pixels]."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).convert("RGB" if channels == 3 else "L")
    array = np.asarray(square.resize((pixels, pixels), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).reshape(pixels, pixels, -1).permute(2, 0, 1).contiguous()
