"""The digits' classifier is good on digits that it has not seen, and nothing is in both halves."""

from __future__ import annotations

import numpy as np
import torch

from data.digits import (
    CLASSES,
    HELD_OUT,
    class_labels,
    classifier_accuracy,
    digit_accuracy,
    digit_batch,
    digits,
)


def test_the_classifier_reads_held_out_digits() -> None:
    assert classifier_accuracy() >= 0.97


def test_it_reads_nothing_into_noise_and_wrong_labels() -> None:
    images, labels = digits(train=False)
    assert digit_accuracy(images, ((labels + 1) % CLASSES).tolist()) < 0.02
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert digit_accuracy(noise, labels.tolist()) < 0.25


def test_channels_are_averaged_and_values_clamped() -> None:
    images, labels = digits(train=False)
    want = digit_accuracy(images, labels.tolist())
    assert digit_accuracy(images.expand(-1, 3, -1, -1), labels.tolist()) == want
    assert digit_accuracy((images * 1.0001).bfloat16(), labels.tolist()) >= want - 0.01


def test_the_split_is_disjoint_whole_and_stratified() -> None:
    from sklearn.datasets import load_digits

    (seen, seen_labels), (held, held_labels) = digits(), digits(train=False)
    assert len(held) == HELD_OUT and len(seen) + len(held) == len(load_digits().data)
    rows = {tuple(image.flatten().tolist()) for image in seen}
    assert not any(tuple(image.flatten().tolist()) in rows for image in held)
    shares = [np.bincount(labels, minlength=CLASSES) / len(labels) for labels in (seen_labels, held_labels)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert seen.min() == -1 and seen.max() == 1 and seen.shape[1:] == (1, 8, 8)


def test_batches_come_from_the_training_part_and_depend_on_the_seed_alone() -> None:
    images, labels = digit_batch(3, 50)
    again, _ = digit_batch(3, 50)
    assert torch.equal(images, again) and not torch.equal(images, digit_batch(4, 50)[0])
    known = {(tuple(image.flatten().tolist()), int(label)) for image, label in zip(*digits(), strict=True)}
    assert all((tuple(i.flatten().tolist()), int(label)) in known for i, label in zip(images, labels, strict=True))


def test_labels_are_balanced() -> None:
    labels = class_labels(7, 25)
    assert labels == class_labels(7, 25) != class_labels(8, 25)
    assert set(np.bincount(labels, minlength=CLASSES).tolist()) == {2, 3}
    assert len(class_labels(2**40, 3)) == 3
