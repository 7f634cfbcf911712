"""Measures cases against one another and writes the report of DESIGN's schema: JSON, Markdown, picture, sample grid."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modules.diffusion_host import WorkCounter, attached_reuse
from trainers.plots import plot_rows, save_grid
from trainers.rows import Case, Row
from trainers.run_folder import atomic_write, versions
from trainers.timing import Timing, alternate, peak_memory
from trainers.verdict import verdict_text

__all__ = ["Case", "Driver", "QualityFn", "Row", "build_report", "measure_cases", "print_table", "write_report"]

QualityFn = Callable[[Tensor, Tensor, Sequence[Any]], float | None]
"""(images, reference images, inputs) -> a figure over all of them; images [N, C, H, W] in -1..1 on the CPU."""

_SAMPLES = 8


class Driver(Protocol):
    """What measuring needs of `modules.pipelines.DiffusionDriver`."""

    @property
    def transformer(self) -> nn.Module:
        """The network whose work is counted."""

    def generate(self, inputs: Any, seeds: list[int], **call: Any) -> Tensor:
        """Images [B, C, H, W] in -1..1, one per input and seed."""


def measure_cases(
    driver: Driver,
    cases: Sequence[Case],
    inputs: Sequence[Any],
    seeds: Sequence[int],
    reference: Tensor,
    *,
    repeats: int,
    batch_size: int,
    timing_batch: int,
    quality_fns: Mapping[str, QualityFn],
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Quality, executed work, time and memory of every case, in the order of the cases.

    Quality and work are taken over all inputs in batches of `batch_size`; time and memory on the first `timing_batch`
    of them, alternating the cases (`trainers.timing.alternate`).

    Args:
        inputs, seeds: one per image; the same seed is the same initial noise in every case.
        reference: [N, C, H, W] in -1..1, the images that quality compares with.
        quality_fns: by metric; a function that gives None leaves its metric out.
        seed: orders the timed rounds.
        notify: told what is being measured.
    Raises:
        ValueError: names repeat, there is not exactly one baseline, or the lengths differ.
    """
    baseline = _checked_baseline(cases, inputs, seeds, reference)
    device = next(driver.transformer.parameters()).device
    timed_inputs, timed_seeds = list(inputs[:timing_batch]), list(seeds[:timing_batch])

    @contextmanager
    def timed(case: Case) -> Iterator[Callable[[], object]]:
        with case.enter() as call:
            yield lambda: driver.generate(timed_inputs, timed_seeds, **call)

    images, work, memory = {}, {}, {}
    for number, case in enumerate(cases, 1):
        notify(f"quality of {case.name} ({number}/{len(cases)})")
        images[case.name], work[case.name] = _generate_and_count(driver, case, inputs, seeds, batch_size)
        with timed(case) as run:
            memory[case.name] = peak_memory(run, device)
    notify(f"timing {len(cases)} cases in turns, {repeats} rounds of {len(timed_inputs)} images")
    prepared = {case.name: (lambda case=case: timed(case)) for case in cases}
    timings = alternate(prepared, baseline, device=device, rounds=repeats, seed=seed)
    rows = []
    for case in cases:
        figures = {name: fn(images[case.name], reference, inputs) for name, fn in quality_fns.items()}
        quality = {name: figure for name, figure in figures.items() if figure is not None}
        rows.append(_row(case, timings[case.name], work[case.name], memory[case.name], quality, images[case.name]))
    return rows


def _checked_baseline(cases: Sequence[Case], inputs: Sequence[Any], seeds: Sequence[int], reference: Tensor) -> str:
    names = [case.name for case in cases]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"case names must be unique but {', '.join(repeated)} repeats")
    baselines = [case.name for case in cases if case.kind == "baseline"]
    if len(baselines) != 1:
        raise ValueError(f"one case must be of kind baseline, found {len(baselines)} among {', '.join(names)}")
    if not len(inputs) == len(seeds) == len(reference):
        raise ValueError(
            f"{len(inputs)} inputs, {len(seeds)} seeds and {len(reference)} references must be equally many"
        )
    return baselines[0]


def _generate_and_count(
    driver: Driver, case: Case, inputs: Sequence[Any], seeds: Sequence[int], batch_size: int
) -> tuple[Tensor, dict[str, float]]:
    """All images of a case on the CPU, and its work per image (a call counts once for its whole batch).

    `cache_bytes`, what is held at the worst moment of the largest batch, is known of what the reuse host drives.
    """
    parts = []
    with case.enter() as call, WorkCounter(driver.transformer) as counter:
        for module in case.counted():
            counter.also(module)
        caches = attached_reuse(driver.transformer)
        for cache in caches:
            cache.watches_memory = True
        for start in range(0, len(inputs), batch_size):
            batch = slice(start, start + batch_size)
            parts.append(driver.generate(list(inputs[batch]), list(seeds[batch]), **call).float().cpu())
        work = counter.work()
    per_image = {"blocks": len(parts), "submodules": len(parts), "macs": len(inputs)}  # only macs grow with the batch
    work = {name: count / per_image[name] for name, count in work.items()}
    if caches:
        work["cache_bytes"] = sum(cache.peak_bytes for cache in caches) / min(batch_size, len(inputs))
    return torch.cat(parts), work


def _row(
    case: Case, timing: Timing, work: dict[str, float], memory: int, quality: dict[str, float], images: Tensor
) -> Row:
    return Row(
        name=case.name,
        kind=case.kind,
        group=case.group or case.name,
        speedup=timing.speedup,
        speedup_range=timing.speedup_range,
        latency_s=timing.latency_s,
        work=work,
        memory_bytes=memory,
        quality=quality,
        samples=images[:_SAMPLES].clone(),
    )


def build_report(
    rows: Sequence[Row],
    *,
    method: str,
    backbone: str,
    device: str,
    commit: str,
    seed: int,
    verdict: dict[str, Any] | None,
    **extra: Any,
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        device: the machine's part that ran, in words.
        verdict: see `trainers.verdict`.
        extra: further facts about the measurement (inputs, reference, timing_batch ...), kept under their names.
    """
    return {
        "method": method,
        "backbone": backbone,
        "device": device,
        "commit": commit,
        "seed": seed,
        "rows": [row.as_json() for row in rows],
        "groups": {row.name: row.group or row.name for row in rows},
        "verdict": verdict,
        "torch_threads": torch.get_num_threads(),
        "created_with": versions(),
        **extra,
    }


def device_name(device: torch.device) -> str:
    """The device as a reader of the table needs it: the GPU's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type}: {models[0] if models else platform.processor() or platform.machine()}"


def write_report(
    folder: Path, report: dict[str, Any], rows: Sequence[Row], plotted: str = "psnr_db", against: str = "speedup"
) -> None:
    """Write report.json, report.md, report.png and samples/grid.png into `folder`, each at once or not at all.

    Args:
        plotted: the quality or work that the picture draws.
        against: the speedup, or a work.
    """
    atomic_write(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    atomic_write(folder / "report.md", markdown(report))
    title = f"{report['method']} on {report['backbone']}"
    plot_rows(folder / "report.png", rows, plotted, title=title, against=against)
    grid = {row.name: row.samples for row in rows if row.samples is not None and row.kind in ("baseline", "adapter")}
    if grid:
        save_grid(folder / "samples" / "grid.png", list(grid.values()), list(grid))


_WORK = {
    "blocks": "blocks",
    "tokens_per_step": "tok/step",
    "tokens_per_s": "tok/s",
    "overhead": "step",
    "kept_units": "units",
    "cache_bytes": "bytes",
    "prefill_speedup": "prefill",
}
"""Work that the tables show, and its heading; `overhead` is the time of a step, the baseline's being 1."""


def _cells(row: Mapping[str, Any], work: Sequence[str], metrics: Sequence[str]) -> list[str]:
    low, high = row["speedup_range"]
    cells = [
        row["name"],
        row["kind"],
        f"{row['speedup']:.2f}x",
        f"{low:.2f}-{high:.2f}",
        f"{row['latency_s'] * 1000:.0f}",
    ]
    cells += [_brief(row["work"].get(name)) for name in work] + [f"{row['memory_bytes'] / 2**20:.0f}"]
    return cells + [f"{row['quality'][name]:.4g}" if name in row["quality"] else "" for name in metrics]


def _brief(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 and value % 1 else f"{value:.1f}".removesuffix(".0")


def _header_and_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(name for row in rows for name in row["quality"]))
    work = [name for name in _WORK if any(name in row["work"] for row in rows)]
    header = ["", "kind", "speedup", "range", "ms", *(_WORK[name] for name in work), "MiB", *metrics]
    return header, [_cells(row, work, metrics) for row in rows]


def markdown(report: Mapping[str, Any]) -> str:
    """`report.md`: the table, what it says, and how it was made."""
    header, body = _header_and_cells(report["rows"])
    aligned = ["---", "---", *["---:"] * (len(header) - 2)]
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, aligned, *body]]
    facts = [f"{report['device']}", f"commit {report['commit']}", f"seed {report['seed']}"]
    facts += [f"{name} {report[name]}" for name in ("inputs", "timing_batch", "reference") if name in report]
    return (
        "\n\n".join(
            [
                f"# {report['method']} on {report['backbone']}",
                "\n".join(lines),
                verdict_text(report.get("verdict")),
                *report.get("left_out", ()),
                *_by_category(report),
                *_by_context(report),
                *_by_length(report),
                f"Measured on {', '.join(facts)}. Speedup is the median over alternating rounds, range its extremes.",
            ]
        )
        + "\n"
    )


def _by_category(report: Mapping[str, Any]) -> list[str]:
    """Speedup and tokens per step of every row, a column for each category of input; empty without categories."""
    categories: Mapping[str, Any] = report.get("categories", {})
    if not categories:
        return []
    lines = [["", *categories], ["---", *["---:"] * len(categories)]]
    for row in report["rows"]:
        found = [categories[name][row["name"]] for name in categories]
        lines.append([row["name"], *(f"{one['speedup']:.2f}x, {one['tokens_per_step']:.2f}" for one in found)])
    if repeated := report.get("repeated_trigrams"):
        lines.append(["repeated trigrams in plain text", *(f"{repeated[name]:.0%}" for name in categories)])
    return [f"Speedup and tokens per step by kind of input:\n\n{_aligned(lines)}"]


def _by_context(report: Mapping[str, Any]) -> list[str]:
    """A column for each other way in which contexts were read; empty without any."""
    contexts: Mapping[str, Any] = report.get("contexts", {})
    if not contexts:
        return []
    metric = next(iter(contexts.values()))["metric"]
    lines = [["", *contexts], ["---", *["---:"] * len(contexts)]]
    for row in report["rows"]:
        found = [one["cases"].get(row["name"]) for one in contexts.values()]
        if any(found):
            lines.append([row["name"], *("" if one is None else f"{one[metric]:.4g}" for one in found)])
    return [f"{metric.capitalize()} where contexts are read in other ways, or are others:\n\n{_aligned(lines)}"]


def _by_length(report: Mapping[str, Any]) -> list[str]:
    """Speed of decoding behind every length; empty with no more than one."""
    lengths: Mapping[str, Any] = report.get("decoding", {})
    if len(lengths) < 2:
        return []
    lines = [["", *(f"{int(length):,} tokens" for length in lengths)], ["---", *["---:"] * len(lengths)]]
    for row in report["rows"]:
        found = [one[row["name"]] for one in lengths.values()]
        cells = [
            f"{one['speedup']:.2f}x ({one['speedup_range'][0]:.2f}-{one['speedup_range'][1]:.2f}), "
            f"{one['cache_bytes'] / 2**20:.2f} MiB"
            for one in found
        ]
        lines.append([row["name"], *cells])
    return [f"Decoding behind a context, and what is held of it:\n\n{_aligned(lines)}"]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """The rows on the terminal, the adapter's in bold; range and memory are in the report, for 80 columns are few."""
    header, body = _header_and_cells([row.as_json() for row in rows])
    shown = [number for number, name in enumerate(header) if name not in ("kind", "range", "MiB")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number in shown:
        table.add_column(header[number], justify="right" if number else "left")
    for row, cells in zip(rows, body, strict=True):
        table.add_row(*(cells[number] for number in shown), style="bold" if row.kind == "adapter" else None)
    (console or Console()).print(table)
