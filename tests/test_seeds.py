"""The table over seeds: which rivals an operating point is compared with, what ranges say, and what does not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, seeds


def row(name: str, kind: str, blocks: float, mse: float, accuracy: float = 1.0) -> dict[str, Any]:
    quality = {"mse": mse, "psnr_db": 40.0, "accuracy": accuracy}
    return {"name": name, "kind": kind, "speedup": 1.5, "work": {"blocks": blocks}, "quality": quality}


def report(half: float, third: float, rivals: list[dict[str, Any]] | None = None, seed: int = 7) -> dict[str, Any]:
    """Operating points at 100 and 70 blocks."""
    own = [row("full", "baseline", 200, 0.0), row("half", "adapter", 100, half), row("third", "adapter", 70, third)]
    found = RIVALS if rivals is None else rivals
    groups = {one["name"]: one["name"].split(" 0.")[0].split(" every")[0] for one in found}
    groups |= {one["name"]: "fewer steps" for one in found if one["kind"] == "plain"}
    facts = {"backbone": "b", "seed": seed, "inputs": 4, "reference": "20 steps"}
    return {**facts, "rows": [*own, *found], "groups": groups}


RIVALS = [
    row("8 steps", "plain", 80, 5e-4),
    row("9 steps", "plain", 90, 4e-4),
    row("12 steps", "plain", 120, 2e-4),
    row("TaylorSeer every 2, warm-up 1, order 1", "untrained", 100, 3e-4),
    row("TaylorSeer every 2, warm-up 1, order 2", "untrained", 100, 9e-4),
    row("TaylorSeer every 3, warm-up 1, order 2", "untrained", 70, 8e-4),
    row("FirstBlockCache 0.2", "untrained", 99, 1e-9),
    row("FirstBlockCache 0.1", "untrained", 104, 1e-4),
    row("DBCache 0.31, warm-up 2", "peer", 71, 6e-4),
]


def test_a_point_is_compared_with_the_least_work_of_each_method_that_is_no_less() -> None:
    lines = seeds.lines_of([report(1e-5, 2e-5), report(3e-5, 4e-5, rivals=[])])
    rivals: dict[str, dict[str, float]] = {"half": {}, "third": {}}
    for line in lines[1:]:
        if line.method != line.point:
            rivals[line.point][line.method] = line.rows[0]["work"]["blocks"]
    taylor = {"TaylorSeer, order 1": 100, "TaylorSeer, order 2": 100}
    assert rivals["half"] == {"fewer steps": 120, **taylor, "FirstBlockCache": 104}
    taylor["TaylorSeer, order 2"] = 70
    assert rivals["third"] == {"fewer steps": 80, **taylor, "FirstBlockCache": 99, "DBCache": 71}
    own = next(line for line in lines if line.method == "half")
    assert own.values("mse") == [1e-5, 3e-5] and lines[0].method == "baseline"


def test_a_point_wins_where_its_whole_range_lies_below_and_it_is_as_accurate() -> None:
    def won(*reports: dict[str, Any]) -> list[bool]:
        return [won for won, _ in seeds.verdicts(seeds.lines_of(list(reports)))]

    closest = [one for one in RIVALS if one["name"] != "FirstBlockCache 0.2"]
    assert won(report(1e-5, 2e-5, closest), report(3e-5, 4e-5, closest)) == [True, True]
    assert won(report(1e-5, 2e-5, closest), report(2e-4, 4e-5, closest)) == [False, True]  # overlaps in one seed
    assert won(report(1e-5, 2e-5)) == [True, False]
    assert won(report(1e-5, 2e-5, [])) == [False, False]  # nothing was compared
    wrong = report(1e-5, 2e-5, closest)
    wrong["rows"][1]["quality"]["accuracy"] = 0.985
    text = seeds.verdicts(seeds.lines_of([wrong]))[0]
    assert not text[0] and "accuracy NOT within 1 point" in text[1] and "fewer steps" not in text[1]


def test_reports_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rivals are of another report, and the reports of different inputs"):
        seeds.lines_of([report(1e-5, 2e-5), report(1e-5, 2e-5, [], seed=8)])
    other = report(1e-5, 2e-5)
    other["rows"][1]["name"] = "other"
    with pytest.raises(ValueError, match="give runs of one recipe"):
        seeds.lines_of([report(1e-5, 2e-5), other])
    assert seeds.lines_of([report(1e-5, 2e-5), report(1e-5, 2e-5, seed=8)])


def test_rivals_of_another_recipe_count_but_not_its_own_parts() -> None:
    other = report(9e-9, 9e-9)
    other["rows"][1]["name"] = "another half"
    other["rows"].append(row("its own table at half, hold", "peer", 100, 1e-9))
    other["groups"]["its own table at half, hold"] = "its own table, hold"
    lines = seeds.lines_of([report(1e-5, 2e-5, [])], [other])
    assert {line.method for line in lines if line.point == "half"} == {
        "half", "fewer steps", "TaylorSeer, order 1", "TaylorSeer, order 2", "FirstBlockCache",
    }  # fmt: skip
    with pytest.raises(ValueError, match="different inputs"):
        seeds.lines_of([report(1e-5, 2e-5, [])], [other | {"inputs": 5}])


def test_reports_from_before_groups_were_kept_are_read_by_name() -> None:
    assert seeds.method_of(RIVALS[0], {}) == "8 steps"
    assert seeds.method_of(RIVALS[4], {}) == "TaylorSeer, order 2"
    assert seeds.method_of(RIVALS[7], {}) == "FirstBlockCache"


def test_the_command_prints_saves_and_says_who_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    folders = []
    for number, one in enumerate((report(1e-5, 2e-5), report(3e-5, 4e-5))):
        folders.append(str(tmp_path / str(number)))
        Path(folders[-1]).mkdir()
        (Path(folders[-1]) / "report.json").write_text(json.dumps(one))
    monkeypatch.setattr("sys.argv", ["seeds", *folders, "--save", "it", "--no-speed"])
    assert seeds.main() == 1  # FirstBlockCache 0.2 is closer at 70 blocks
    printed = capsys.readouterr().out
    assert "| **half** | adapter | 100 |  | 1e-05 to 3e-05 |" in printed
    assert "third: MSE at most 4e-05, overlaps with FirstBlockCache (1e-09)" in printed
    with (tmp_path / "results" / "it.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["row"] == "half" and rows[1]["mse_high"] == "3.000e-05" and rows[1]["speedup"] == ""
    assert seeds.main() == 1 and len((tmp_path / "results" / "it.csv").read_text().splitlines()) == 2 * len(rows) + 1
    monkeypatch.setattr("sys.argv", ["seeds", str(tmp_path / "nowhere")])
    assert seeds.main() == 2 and "no report.json in" in capsys.readouterr().err


def test_rows_with_other_columns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.append("it", [{"a": 1}])
    with pytest.raises(ValueError, match="has the columns"):
        results.append("it", [{"b": 1}])
