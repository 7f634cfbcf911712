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
# Area of a shape over the area of its bounding box; the checker's borders lie between these.
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}


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
    """A random scene: attributes uniform, geometry jittered by up to 1.2 px and 8% so that a caption has many pictures."""

    def item(shape: str, colour: str, x: float, y: float, radius: float) -> Item:
        jitter = 1.2
        return Item(shape, colour, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter),
                    radius * rng.uniform(0.92, 1.08))

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


def _read_item(image: np.ndarray, mask: np.ndarray) -> Item | None:
    ys, xs = np.nonzero(mask)
    width, height = int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1
    if min(width, height) < 4:
        return None
    # The inner pixels carry the colour; the rim is blended with the background.
    inner = ndimage.binary_erosion(mask)
    colour = _nearest(image[inner if inner.any() else mask], COLOURS)
    fill = mask.sum() / (width * height)
    shape = min(FILL, key=lambda name: abs(FILL[name] - fill))
    return Item(shape, colour, (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2, (width + height) / 4)


def read_scene(image: np.ndarray) -> str:
    """The caption that an image shows.

    Args:
        image: RGB in 0..1, [RESOLUTION, RESOLUTION, 3].
    Returns:
        A caption in the words of `draw_attributes`, or "unreadable" when there are not one or two clear shapes.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = _nearest(border, BACKGROUNDS)
    differs = np.abs(image - np.median(border, axis=0)).max(-1)
    # Pixels at least half covered: half of the largest contrast found inside each region.
    labels, count = ndimage.label(differs > 0.12)
    items = []
    for index in range(1, count + 1):
        region = labels == index
        if region.sum() < 12:
            continue
        items.extend(_split_by_colour(image, region, np.median(border, axis=0)))
    items = [item for item in items if item is not None]
    if len(items) == 1:
        (one,) = items
        place = min(PLACES, key=lambda name: float(np.hypot(one.x - PLACES[name][0], one.y - PLACES[name][1])))
        size = min(RADII, key=lambda name: abs(one.radius - RADII[name]))
        return f"a {size} {one.colour} {one.shape} at the {place} on a {background} background"
    if len(items) == 2:
        horizontal = abs(items[0].x - items[1].x) > abs(items[0].y - items[1].y)
        first, second = sorted(items, key=lambda item: item.x if horizontal else item.y)
        relation = "left of" if horizontal else "above"
        return (f"a {first.colour} {first.shape} {relation} a {second.colour} {second.shape} "
                f"on a {background} background")
    return "unreadable"


def _split_by_colour(image: np.ndarray, region: np.ndarray, background: np.ndarray) -> list[Item | None]:
    """One item per colour in a connected region (two shapes that touch are two colours)."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names]) / 255.0
    found: list[Item | None] = []
    offset = image - background
    # Each pixel is background plus coverage times (colour - background): solve for coverage against every colour.
    directions = palette - background
    norms = (directions**2).sum(-1)
    cover = np.clip(offset @ directions.T / norms, 0.0, 1.0)
    misfit = ((offset[..., None, :] - cover[..., None] * directions) ** 2).sum(-1)
    owner = misfit.argmin(-1)
    for index in range(len(names)):
        solid = region & (owner == index) & (cover[..., index] > 0.8)
        if solid.sum() < 8:
            continue
        mask = region & (owner == index) & (cover[..., index] >= 0.5)
        labels, count = ndimage.label(mask)
        if count == 0:
            continue
        sizes = ndimage.sum(mask, labels, range(1, count + 1))
        found.append(_read_item(image, labels == int(np.argmax(sizes)) + 1))
    return found


def caption_accuracy(images: Tensor, wanted: list[str]) -> float:
    """Share of images that show exactly what their caption says, every attribute at once.

    Args:
        images: [B, 3, RESOLUTION, RESOLUTION] in -1..1 or beyond (clamped).
        wanted: B captions.
    """
    pictures = (images.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).float().cpu().numpy()
    return float(np.mean([read_scene(p) == caption for p, caption in zip(pictures, wanted, strict=True)]))
