"""How close generated images are to reference images.

Every function takes images [B, C, H, W] in -1..1, as the pipelines give them, and compares them in 0..1 after clamping,
as a picture file would hold them.  Each figure is taken per image and then averaged: a mean of per-image PSNR is lower
than the PSNR of the mean error whenever images differ in difficulty, so the two must not be mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MAX_PSNR_DB = 100.0
"""What equal images are given: their PSNR is infinite, which JSON cannot hold."""


def _unit(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != reference.shape:
        raise ValueError(
            f"images are {tuple(images.shape)} but the reference is {tuple(reference.shape)}; they must match"
        )
    return _to_unit(images), _to_unit(reference)


def _to_unit(images: Tensor) -> Tensor:
    return images.float().add(1).div(2).clamp(0, 1)


def mse_per_image(images: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of each image, [B], in 0..1 units squared."""
    images, reference = _unit(images, reference)
    return (images - reference).square().flatten(1).mean(1)


def psnr_db_per_image(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [B], peak 1, at most `MAX_PSNR_DB`."""
    return (-10 * torch.log10(mse_per_image(images, reference))).clamp(max=MAX_PSNR_DB)


def mse(images: Tensor, reference: Tensor) -> float:
    """Mean over the images of `mse_per_image`."""
    return mse_per_image(images, reference).mean().item()


def psnr_db(images: Tensor, reference: Tensor) -> float:
    """Mean over the images of `psnr_db_per_image`."""
    return psnr_db_per_image(images, reference).mean().item()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity, in -1..1 and 1 for equal images.

    Wang et al. 2004 with their constants: Gaussian window of 11 pixels and sigma 1.5, only where it fits into the
    image, averaged over channels.  Departs from them on images under 11 pixels, where the window shrinks to the largest
    odd size that fits.
    """
    images, reference = _unit(images, reference)
    side = min(11, *images.shape[-2:])
    window = _gaussian_window(side - 1 + side % 2).to(images)
    x, y = images.flatten(0, 1).unsqueeze(1), reference.flatten(0, 1).unsqueeze(1)

    def smooth(values: Tensor) -> Tensor:
        return functional.conv2d(values, window)

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index = index / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return index.mean().item()


def _gaussian_window(size: int, sigma: float = 1.5) -> Tensor:
    """[1, 1, size, size], sums to 1."""
    offsets = torch.arange(size) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    line = line / line.sum()
    return (line[:, None] * line[None, :])[None, None]
