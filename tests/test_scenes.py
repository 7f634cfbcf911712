"""The checker of captioned scenes reads every drawing back, and nothing but what is there."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    RESOLUTION,
    SHAPES,
    Item,
    Scene,
    caption_accuracy,
    captions,
    draw_attributes,
    read_scene,
    render,
    scene_batch,
    vocabulary,
)

NOISE = 0.06  # of an image in 0..1: more than samples of a good model have


def scenes(seed: int, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_attributes(rng) for _ in range(count)]


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    return np.clip(image + np.random.default_rng(seed).normal(0, NOISE, image.shape), 0, 1)


def single(shape: str, colour: str, place: str, size: str, background: str) -> Scene:
    return Scene(
        f"a {size} {colour} {shape} at the {place} on a {background} background",
        background,
        (Item(shape, colour, *PLACES[place], RADII[size]),),
    )


def test_every_drawing_is_read_back() -> None:
    for scene in scenes(0, 600):
        assert read_scene(render(scene)) == scene.caption


def test_noise_is_no_excuse() -> None:
    drawn = scenes(1, 400)
    read = [read_scene(noisy(render(scene), i)) == scene.caption for i, scene in enumerate(drawn)]
    assert np.mean(read) >= 0.99


def test_every_combination_of_attributes_is_read_back() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            for background in BACKGROUNDS:
                for place in PLACES:
                    for size in RADII:
                        scene = single(shape, colour, place, size, background)
                        assert read_scene(render(scene)) == scene.caption


@pytest.mark.parametrize("seed", range(3))
def test_changing_one_attribute_of_the_drawing_changes_the_caption_read(seed: int) -> None:
    rng = random.Random(seed)
    for scene in scenes(seed + 10, 60):
        item = scene.items[0]
        taken = {other.colour for other in scene.items}
        colour = rng.choice([c for c in COLOURS if c not in taken])
        shape = rng.choice([s for s in SHAPES if s != item.shape])
        background = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        changed = [
            replace(scene, items=(replace(item, colour=colour), *scene.items[1:])),
            replace(scene, items=(replace(item, shape=shape), *scene.items[1:])),
            replace(scene, background=background),
        ]
        if len(scene.items) == 1:
            radius = RADII["small" if item.radius > 6 else "large"]
            far = [PLACES[p] for p in PLACES if p not in scene.caption]
            x, y = rng.choice(far)
            changed += [replace(scene, items=(replace(item, radius=radius),))]
            changed += [replace(scene, items=(replace(item, x=x, y=y),))]
        else:
            changed += [replace(scene, items=tuple(replace(i, x=i.y, y=i.x) for i in scene.items))]
            one, two = scene.items
            changed += [replace(scene, items=(replace(one, x=two.x, y=two.y), replace(two, x=one.x, y=one.y)))]
        for other in changed:
            assert read_scene(render(other)) != scene.caption


def test_an_empty_image_shows_nothing() -> None:
    for colour in BACKGROUNDS.values():
        assert read_scene(np.broadcast_to(np.array(colour) / 255, (RESOLUTION, RESOLUTION, 3)).copy()) == "unreadable"


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(0)
    flat = [rng.uniform(size=(RESOLUTION, RESOLUTION, 3)) for _ in range(40)]
    coarse = [np.kron(rng.uniform(size=(8, 8, 3)), np.ones((4, 4, 1))) for _ in range(40)]
    asked = captions(3, 80)
    assert all(read_scene(image) != caption for image, caption in zip(flat + coarse, asked, strict=True))
    assert np.mean([read_scene(image) == "unreadable" for image in flat]) >= 0.95


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", ["left", "right", "top", "bottom"])
def test_half_a_shape_is_not_that_shape(shape: str, half: str) -> None:
    scene = single(shape, "red", "center", "large", "white")
    image, middle = render(scene), RESOLUTION // 2
    rows = {"top": slice(0, middle), "bottom": slice(middle, None)}.get(half, slice(None))
    columns = {"left": slice(0, middle), "right": slice(middle, None)}.get(half, slice(None))
    image[rows, columns] = np.array(BACKGROUNDS["white"]) / 255
    assert read_scene(image) != scene.caption


def test_three_shapes_are_none_of_ours() -> None:
    for scene in scenes(5, 60):
        if len(scene.items) == 2:
            third = next(colour for colour in COLOURS if all(colour != item.colour for item in scene.items))
            corner = Item("circle", third, 4.5, 27.5, 3.5)
            assert read_scene(render(replace(scene, items=(*scene.items, corner)))) != scene.caption


@pytest.mark.parametrize("noise", [False, True])
def test_two_shapes_of_one_colour_are_not_a_pair_and_not_a_single(noise: bool) -> None:
    for i, scene in enumerate(scenes(6, 60)):
        if len(scene.items) == 2:
            one, two = scene.items
            shown = [one, replace(two, colour=one.colour)]
        else:
            place = next(xy for name, xy in PLACES.items() if name not in scene.caption and name != "center")
            shown = [replace(scene.items[0], radius=4.0), replace(scene.items[0], x=place[0], y=place[1], radius=4.0)]
            if np.hypot(shown[0].x - place[0], shown[0].y - place[1]) < 12:
                continue
        image = render(replace(scene, items=tuple(shown)))
        assert read_scene(noisy(image, i) if noise else image) == "unreadable"


def test_batches_are_a_function_of_the_seed_and_within_range() -> None:
    (images, texts), (again, same), (_, other) = scene_batch(4, 8), scene_batch(4, 8), scene_batch(5, 8)
    assert torch.equal(images, again) and texts == same and texts != other
    assert images.shape == (8, 3, RESOLUTION, RESOLUTION) and -1 <= images.min() and images.max() <= 1
    assert caption_accuracy(images, texts) == 1.0 and caption_accuracy(images, texts[1:] + texts[:1]) < 0.3
    ranged = images.sign() * torch.where(images.abs() > 0.99, 1.5, images.abs())
    assert caption_accuracy(ranged, texts) == 1.0  # beyond the range is clamped


def test_captions_use_the_vocabulary_and_show_all_of_it() -> None:
    used = {word for caption in captions(0, 500) for word in caption.split()}
    assert sorted(used) == vocabulary()
