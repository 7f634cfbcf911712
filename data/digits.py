"""Handwritten digits (scikit-learn's, 8x8, 16 grey levels) and the classifier that reads samples back.

Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits"; the 1,797 images that scikit-learn
ships.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

RESOLUTION = 8
CLASSES = 10
HELD_OUT = 360


@lru_cache(maxsize=1)
def _split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(pixels, labels, test_size=HELD_OUT, random_state=0, stratify=labels))


def digits(train: bool = True) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in -1..1 and labels [N]; the held-out part was never trained on, by any model here."""
    train_x, test_x, train_y, test_y = _split()
    pixels, labels = (train_x, train_y) if train else (test_x, test_y)
    images = torch.from_numpy(pixels.reshape(-1, 1, RESOLUTION, RESOLUTION)).float() / 8 - 1
    return images, torch.from_numpy(labels).long()


def digit_batch(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """`size` training digits that depend on `seed` alone: images [size, 1, 8, 8] in -1..1, labels [size]."""
    images, labels = digits()
    chosen = torch.from_numpy(np.random.default_rng(seed).integers(0, len(labels), size))
    return images[chosen], labels[chosen]


def class_labels(seed: int, count: int) -> list[int]:
    """`count` labels that depend on `seed` alone, each class equally often (up to the remainder)."""
    labels = np.arange(count) % CLASSES
    return [int(label) for label in np.random.default_rng(seed % 2**32).permutation(labels)]


@lru_cache(maxsize=1)
def _classifier() -> SVC:
    pixels, _, labels, _ = _split()
    return SVC(gamma=0.001, C=10.0).fit(pixels, labels)


def _pixels(images: Tensor) -> np.ndarray:
    flat = images.detach().clamp(-1, 1).float().cpu().mean(1).reshape(len(images), -1)
    return ((flat + 1) * 8).numpy()


def classifier_accuracy() -> float:
    """The classifier's own accuracy on held-out real digits."""
    images, labels = digits(train=False)
    return digit_accuracy(images, labels.tolist())


def digit_accuracy(images: Tensor, labels: list[int]) -> float:
    """Share of images that a support vector classifier of real digits reads as their label.

    Args:
        images: [B, C, 8, 8] in -1..1 or beyond (clamped); channels are averaged.
        labels: B digits.
    """
    return float(np.mean(_classifier().predict(_pixels(images)) == np.asarray(labels)))
