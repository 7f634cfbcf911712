"""Captioned scenes drawn by code, and the analytic checker that reads them back.

A scene is one or two filled shapes on a plain background.  Everything a caption names is a discrete attribute with a
known colour or geometry, so whether an image shows what its caption asks for is a matter of measuring pixels, not of
a second learned model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

RESOLUTION = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128), "cyan": (120, 220, 230)}
RADII = {"small": 4.5, "large": 8.0}
PLACES = {
    "top left": (9.5, 9.5),
    "top right": (22.5, 9.5),
    "center": (16.0, 16.0),
    "bottom left": (9.5, 22.5),
    "bottom right": (22.5, 22.5),
}
RELATIONS = {"left of": (-1, 0), "above": (0, -1)}
PAIR_RADIUS, PAIR_OFFSET = 5.5, 7.5
UNIT_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of a shape with radius 1
MIN_PIXELS = 6  # fewer solid pixels of one colour are a speck, not a shape
MAX_MISFIT = 0.2  # squared error over area: blurred shapes stay below 0.1, other figures above 0.25


@dataclass(frozen=True)
class Item:
    """One shape: its attributes as the caption names them, and where it lies (pixels, y down)."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption with one of the many pictures it describes."""

    caption: str
    background: str
    items: tuple[Item, ...]


def draw_attributes(rng: random.Random) -> Scene:
    """A random scene: attributes uniform, geometry jittered by up to 1.2 px and 8%: a caption has many pictures."""

    def item(shape: str, colour: str, x: float, y: float, radius: float) -> Item:
        jitter = 1.2
        return Item(
            shape,
            colour,
            x + rng.uniform(-jitter, jitter),
            y + rng.uniform(-jitter, jitter),
            radius * rng.uniform(0.92, 1.08),
        )

    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.35:
        relation, (dx, dy) = rng.choice(list(RELATIONS.items()))
        colours = rng.sample(list(COLOURS), 2)
        shapes = [rng.choice(SHAPES), rng.choice(SHAPES)]
        middle = RESOLUTION / 2
        items = tuple(
            item(s, c, middle + sign * dx * PAIR_OFFSET, middle + sign * dy * PAIR_OFFSET, PAIR_RADIUS)
            for s, c, sign in zip(shapes, colours, (1, -1), strict=True)
        )
        caption = f"a {colours[0]} {shapes[0]} {relation} a {colours[1]} {shapes[1]} on a {background} background"
        return Scene(caption, background, items)
    size, place = rng.choice(list(RADII)), rng.choice(list(PLACES))
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    caption = f"a {size} {colour} {shape} at the {place} on a {background} background"
    return Scene(caption, background, (item(shape, colour, *PLACES[place], RADII[size]),))


def _coverage(item: Item, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, from its signed distance; [H, W] in 0..1."""
    dx, dy, r = xs - item.x, ys - item.y, item.radius
    if item.shape == "circle":
        distance = np.hypot(dx, dy) - r
    elif item.shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - r
    else:  # isosceles, base 2r at the bottom, height 2r: half of its bounding box
        slope = np.sqrt(5.0)
        distance = np.maximum(dy - r, (2 * abs(dx) - dy - r) / slope)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """The scene as float32 RGB in 0..1, [RESOLUTION, RESOLUTION, 3], edges anti-aliased."""
    ys, xs = np.mgrid[0:RESOLUTION, 0:RESOLUTION] + 0.5
    image = np.broadcast_to(np.array(BACKGROUNDS[scene.background]) / 255.0, (RESOLUTION, RESOLUTION, 3)).copy()
    for item in scene.items:
        alpha = _coverage(item, xs, ys)[..., None]
        image = alpha * np.array(COLOURS[item.colour]) / 255.0 + (1 - alpha) * image
    return image.astype(np.float32)


def scene_batch(seed: int, size: int) -> tuple[Tensor, list[str]]:
    """`size` scenes that depend on `seed` alone: images [size, 3, RESOLUTION, RESOLUTION] in -1..1, and captions."""
    rng = random.Random(seed)
    scenes = [draw_attributes(rng) for _ in range(size)]
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2)
    return images * 2 - 1, [s.caption for s in scenes]


def captions(seed: int, count: int) -> list[str]:
    """`count` captions that depend on `seed` alone; held-out prompts are those of a seed never trained on."""
    rng = random.Random(seed)
    return [draw_attributes(rng).caption for _ in range(count)]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    text = " ".join([*SHAPES, *COLOURS, *BACKGROUNDS, *RADII, *PLACES, *RELATIONS, "a at the on background"])
    return sorted(set(text.split()))


def _nearest(pixels: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    colour = np.median(pixels, axis=0)
    return min(palette, key=lambda name: float(np.abs(colour - np.array(palette[name]) / 255.0).sum()))


def _fit_item(cover: np.ndarray, colour: str) -> Item | None:
    """The shape whose picture is nearest to a map of coverage, [H, W] in 0..1; None when none is near.

    Each candidate gets the centre and the size that its area and centre of mass imply, so that nothing is searched.
    """
    ys, xs = np.mgrid[0:RESOLUTION, 0:RESOLUTION] + 0.5
    area = cover.sum()
    x, y = (cover * xs).sum() / area, (cover * ys).sum() / area
    candidates = []
    for shape, unit_area in UNIT_AREA.items():
        radius = float(np.sqrt(area / unit_area))
        lift = radius / 3 if shape == "triangle" else 0.0  # a triangle's centre of mass lies below its box's centre
        item = Item(shape, colour, float(x), float(y) - lift, radius)
        misfit = ((_coverage(item, xs, ys) - cover) ** 2).sum() / area
        candidates.append((misfit, item))
    misfit, item = min(candidates, key=lambda pair: pair[0])
    return item if misfit < MAX_MISFIT else None


def read_scene(image: np.ndarray) -> str:
    """The caption that an image shows.

    Args:
        image: RGB in 0..1, [RESOLUTION, RESOLUTION, 3].
    Returns:
        A caption in the words of `draw_attributes`, or "unreadable" when there are not one or two clear shapes.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = _nearest(border, BACKGROUNDS)
    items = _find_items(image, np.median(border, axis=0))
    if any(item is None for item in items):
        return "unreadable"
    if len(items) == 1:
        (one,) = items
        place = min(PLACES, key=lambda name: float(np.hypot(one.x - PLACES[name][0], one.y - PLACES[name][1])))
        size = min(RADII, key=lambda name: abs(one.radius - RADII[name]))
        return f"a {size} {one.colour} {one.shape} at the {place} on a {background} background"
    if len(items) == 2:
        horizontal = abs(items[0].x - items[1].x) > abs(items[0].y - items[1].y)
        first, second = sorted(items, key=lambda item: item.x if horizontal else item.y)
        relation = "left of" if horizontal else "above"
        return (
            f"a {first.colour} {first.shape} {relation} a {second.colour} {second.shape} on a {background} background"
        )
    return "unreadable"


def _find_items(image: np.ndarray, background: np.ndarray) -> list[Item | None]:
    """One item per colour present; None stands for a region that is no known shape, or for a second of its colour."""
    # Each pixel is background plus coverage times (colour - background): solve for coverage against every colour.
    offset = image - background
    directions = np.array(list(COLOURS.values())) / 255.0 - background
    cover = np.clip(offset @ directions.T / (directions**2).sum(-1), 0.0, 1.0)
    misfit = ((offset[..., None, :] - cover[..., None] * directions) ** 2).sum(-1)
    # Thin blends look like any colour: only nearly covered pixels vote, and the rest goes to the nearest voter.
    sure = (cover.max(-1) > 0.8) & (misfit.min(-1) < 0.05)
    owner = misfit.argmin(-1)
    found: list[Item | None] = []
    masks, repeated = {}, False
    for index, colour in enumerate(COLOURS):
        labels, count = ndimage.label(sure & (owner == index))
        sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
        if count and sizes.max() >= MIN_PIXELS:
            masks[colour] = labels == int(np.argmax(sizes)) + 1
            repeated |= int((sizes >= MIN_PIXELS).sum()) > 1
    if repeated:  # no caption speaks of two shapes of one colour
        return [None]
    distances = {colour: ndimage.distance_transform_edt(~mask) for colour, mask in masks.items()}
    for index, colour in enumerate(COLOURS):
        if colour in masks:
            others = [distances[other] for other in masks if other != colour]
            near = (distances[colour] <= 3.0) & np.all([distances[colour] < other for other in others], axis=0)
            found.append(_fit_item(np.where(near, cover[..., index], 0.0), colour))
    return found


def caption_accuracy(images: Tensor, wanted: list[str]) -> float:
    """Share of images that show exactly what their caption says, every attribute at once.

    Args:
        images: [B, 3, RESOLUTION, RESOLUTION] in -1..1 or beyond (clamped).
        wanted: B captions.
    """
    pictures = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).float().cpu().numpy()
    return float(np.mean([read_scene(p) == caption for p, caption in zip(pictures, wanted, strict=True)]))
