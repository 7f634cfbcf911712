"""Learned KV caches by the commands: trained, exported, measured, and measured together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from checkpoints.manifest import read_manifest
from tests.tiny_kv import save_tiny
from trainers import evaluate, fit
from trainers.rows import Row
from trainers.verdict import equal_memory_verdict, verdict_text

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method on the same tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    name = save_tiny(folder)
    for method in ("locret", "matryoshka_kv"):
        text = f"data.path={folder / 'text'}"
        argv = [f"recipe={HERE / f'{method}_tiny.yaml'}", f"backbone.name={name}", text, "evaluate=false"]
        assert fit.main([*argv, f"output_dir={folder}", "run=a"]) == 0
    return {method: folder / f"{method}_tiny" / "a" for method in ("locret", "matryoshka_kv")}


def report_of(run: Path, **changes: Any) -> dict[str, Any]:
    settings = [f"evaluation.{name}={value}" for name, value in changes.items()]
    small = [
        "evaluation.inputs=2",
        "evaluation.batch_size=2",
        "evaluation.new_tokens=2",
        "evaluation.timing_context=[48,640]",
    ]
    text = f"evaluation.prompts={run.parents[1] / 'text'}"
    assert evaluate.main([f"adapter={run / 'adapter'}", "device=cpu", text, *small, *settings]) == 0
    return json.loads((run / "report.json").read_text())


def test_a_locret_adapter_is_measured_against_every_untrained_selector(runs: dict[str, Path]) -> None:
    report = report_of(runs["locret"])
    rows = {row["name"]: row for row in report["rows"]}
    assert report["context"] == 96 and len(rows) == 1 + 3 + 6 * 3
    full = rows["full cache"]
    for name in ("Locret, 0.0625", "SnapKV, 0.0625", "expected attention, 0.25", "random, 0.125"):
        share = float(name.split(", ")[1])
        assert rows[name]["work"]["kept_units"] == 96 * share and full["work"]["kept_units"] == 96
        # Keys and values of two layers and heads of 8, and a score or a place for each.
        per_unit = rows[name]["work"]["cache_bytes"] / (96 * share)
        assert 2 * 2 * 2 * 8 * 4 <= per_unit <= 2 * 2 * (2 * 8 + 1) * 4
        assert all(math.isfinite(value) for value in rows[name]["quality"].values())
    chunks = report["contexts"]["in chunks"]
    assert chunks["chunk"] == 64 and chunks["cases"]["Locret, 0.25"]["peak_units"] == 64
    assert chunks["cases"].keys() == rows.keys() and set(report["contexts"]) == {"in chunks"}
    assert report["verdict"]["metric"] == "perplexity" and len(report["verdict"]["rivals"]) == 6
    for length, found in report["decoding"].items():
        assert found.keys() == rows.keys() and found["full cache"]["cache_bytes"] == int(length) * 2 * 2 * 2 * 8 * 4
        eighth = found["Locret, 0.125"]["cache_bytes"] / found["full cache"]["cache_bytes"]
        assert eighth == pytest.approx(17 / 16 / 8) and found["Locret, 0.125"]["tokens_per_s"] > 0
    assert list(report["decoding"]) == ["48", "640"] and report["timing_context"] == 48
    assert report["decoding"]["48"]["random, 0.25"]["speedup"] == rows["random, 0.25"]["speedup"]
    text = (runs["locret"] / "report.md").read_text()
    assert "Perplexity where contexts are read in other ways" in text and "| 48 tokens | 640 tokens |" in text
    assert (runs["locret"] / "report.png").is_file()
    assert "0.0625" in (runs["locret"] / "adapter" / "README.md").read_text()


def test_a_matryoshka_adapter_is_measured_against_pca_and_beside_locret(runs: dict[str, Path]) -> None:
    report = report_of(runs["matryoshka_kv"], beside=runs["locret"] / "adapter")
    rows = {row["name"]: row for row in report["rows"]}
    full = rows["full cache"]["work"]["cache_bytes"]
    for name in ("MatryoshkaKV, 0.5 everywhere", "PCA, 0.5"):
        assert rows[name]["work"]["cache_bytes"] == full / 2
    for budget in ("0.75", "0.5"):
        assert rows[f"MatryoshkaKV, {budget}"]["work"]["cache_bytes"] <= float(budget) * full
    # Half the width and a score for each head's unit: 2 x 4 of 2 x 8 numbers, and one.
    both = rows["both, 0.0625 of the bytes"]
    assert both["kind"] == "adapter" and both["work"]["kept_units"] == int(96 / 16 * 16 / 9)
    assert 0.9 * full / 16 <= both["work"]["cache_bytes"] <= full / 16
    tables = read_manifest(runs["matryoshka_kv"] / "adapter").module["ranks"]
    assert set(tables) == {"0.75", "0.5"}


def row(name: str, kind: Any, size: float, **quality: float) -> Row:
    return Row(
        name=name,
        kind=kind,
        group=name.partition(",")[0],
        speedup=1.0,
        speedup_range=(1.0, 1.0),
        latency_s=0.01,
        work={"cache_bytes": size},
        memory_bytes=0,
        quality=quality,
    )


def test_the_verdict_compares_what_holds_as_many_bytes() -> None:
    rows = [
        row("full", "baseline", 1000, accuracy=1.0, perplexity=2.0),
        row("ours, 0.1", "adapter", 100, accuracy=0.9, perplexity=3.0),
        row("a, 0.05", "untrained", 50, accuracy=0.95, perplexity=2.5),
        row("a, 0.1", "untrained", 104, accuracy=0.8, perplexity=4.0),
        row("a, 0.2", "untrained", 200, accuracy=0.99, perplexity=2.1),
        row("b, 0.5", "untrained", 500, accuracy=1.0, perplexity=2.0),
    ]
    verdict = equal_memory_verdict(rows, "accuracy")
    assert [(one["name"], round(one["margin"], 6)) for one in verdict["rivals"]] == [("a, 0.1", 0.1)]
    assert verdict["unmatched"] == ["b"] and verdict["wins"] and verdict["share"] == 0.1
    assert "0.900 with 10.0% of the full cache's bytes" in verdict_text(verdict)
    verdict = equal_memory_verdict(rows, "perplexity")
    assert verdict["rivals"][0]["margin"] == 1.0 and "a, 0.1 is worse at 4.00" in verdict_text(verdict)
    rows[3] = row("a, 0.1", "untrained", 104, accuracy=0.99, perplexity=2.0)
    lost = equal_memory_verdict(rows, "perplexity")
    assert not lost["wins"] and "It loses to a, 0.1" in verdict_text(lost)
    assert equal_memory_verdict(rows[:1], "accuracy") is None
