"""The two pictures of a report: quality against speed, and rows of samples above one another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainers.rows import Kind, Row
from trainers.run_folder import atomic_write

_STYLES: dict[Kind, tuple[str, str, float]] = {
    "baseline": ("s", "#444444", 60),
    "plain": ("o", "#1f77b4", 45),
    "untrained": ("^", "#ff7f0e", 55),
    "peer": ("D", "#2ca02c", 45),
    "adapter": ("*", "#d62728", 260),
}
_METRIC_NAMES = {
    "psnr_db": "PSNR to the reference (dB)",
    "tokens_per_step": "tokens per backbone call",
    "speedup": "speedup over the baseline (x)",
    "cache_bytes": "bytes held per sequence",
}
_LABEL_PLACES = [(x, y) for y in (5, -5, 14, -14, 23, -23) for x in (9, -9)]
_TILE = 96
_GAP = 4


def plot_rows(
    path: Path, rows: Sequence[Row], metric: str = "psnr_db", *, title: str = "", against: str = "speedup"
) -> None:
    """Write a PNG of `metric`, a quality or a work, against speedup or a work: a marker per kind, bars for ranges.

    Where quality falls with speed, a line goes along the plain sampler.
    """
    shown = [row for row in rows if _value(row, metric) is not None]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plain = sorted((row for row in shown if row.kind in ("plain", "baseline")), key=lambda row: row.speedup)
    if against == "speedup" and any(metric in row.quality for row in plain):
        axes.plot(
            [row.speedup for row in plain], [_value(row, metric) for row in plain], color=_STYLES["plain"][1], alpha=0.5
        )
    if against != "speedup":
        axes.set_xscale("log", base=2)
    for kind, (marker, colour, size) in _STYLES.items():
        of_kind = [row for row in shown if row.kind == kind]
        if of_kind:
            _draw_kind(axes, of_kind, metric, against, kind, marker, colour, size)
    axes.set(xlabel=_METRIC_NAMES[against], ylabel=_METRIC_NAMES.get(metric, metric), title=title)
    axes.margins(x=0.16, y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", framealpha=0.9)
    _label(axes, shown, metric, against)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())


def _value(row: Row, metric: str) -> float | None:
    return row.quality.get(metric, row.work.get(metric))


def _place(row: Row, against: str) -> float:
    return row.speedup if against == "speedup" else row.work[against]


def _draw_kind(
    axes: Axes, rows: Sequence[Row], metric: str, against: str, kind: str, marker: str, colour: str, size: float
) -> None:
    x, y = [_place(row, against) for row in rows], [_value(row, metric) for row in rows]
    if against == "speedup":
        spread = [
            [row.speedup - row.speedup_range[0] for row in rows],
            [row.speedup_range[1] - row.speedup for row in rows],
        ]
        axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=colour, alpha=0.35, zorder=2)
    axes.scatter(x, y, marker=marker, s=size, color=colour, label=kind, zorder=4 if kind == "adapter" else 3)


def _label(axes: Axes, rows: Sequence[Row], metric: str, against: str) -> None:
    """Names beside the points, each at the first place around its point where it covers neither a name nor a point."""
    points = [(_place(row, against), _value(row, metric)) for row in rows]
    figure = axes.get_figure(root=True)
    assert figure is not None  # the axes were made from one
    figure.draw_without_rendering()  # settles the layout that the boxes are measured in
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels]
    for row, point in sorted(zip(rows, points, strict=True), key=lambda pair: pair[0].kind != "adapter"):
        weight = "bold" if row.kind == "adapter" else "normal"
        places = [(-x if row.kind == "untrained" else x, y) for x, y in _LABEL_PLACES]  # away from the plain line
        for place in places:
            name = axes.annotate(
                row.name, point, xytext=place, textcoords="offset points", fontsize=8, fontweight=weight
            )
            name.set(ha="left" if place[0] > 0 else "right", va="center")
            box = name.get_window_extent()
            if place == places[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            name.remove()


def save_grid(path: Path, rows: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Write a PNG with one line of images per row and its label at the left.

    Args:
        rows: images [N, C, H, W] in -1..1, C 1 or 3; small ones are enlarged by a whole factor without smoothing.
        labels: one per row.
    Raises:
        ValueError: there is no row, or labels are not as many as rows.
    """
    if not rows or len(rows) != len(labels):
        raise ValueError(f"a grid needs one label per row; got {len(rows)} rows and {len(labels)} labels")
    tiles = [[_tile(image) for image in images] for images in rows]
    font = ImageFont.load_default(size=14)
    margin = 2 * _GAP + max(int(font.getlength(line)) for label in labels for line in label.split("\n"))
    width, height = max(line[0].width for line in tiles), max(line[0].height for line in tiles)
    columns = max(len(line) for line in tiles)
    canvas = Image.new("RGB", (margin + columns * (width + _GAP), len(tiles) * (height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (line, label) in enumerate(zip(tiles, labels, strict=True)):
        top = _GAP + y * (height + _GAP)
        draw.multiline_text((_GAP, top + height / 2), label, fill="black", font=font, anchor="lm")
        for x, tile in enumerate(line):
            canvas.paste(tile, (margin + x * (width + _GAP), top))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())


def _tile(image: Tensor) -> Image.Image:
    """One image [C, H, W] in -1..1 as RGB, at least `_TILE` pixels wide."""
    unit = image.detach().float().add(1).div(2).clamp(0, 1).cpu()
    pixels = unit.expand(3, -1, -1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    factor = max(1, -(-_TILE // picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
