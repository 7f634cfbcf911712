"""One table from the reports of several training seeds: `python -m benchmarks.seeds FOLDER FOLDER ... [--save NAME]`.

    for s in 0 1 2; do python -m trainers.fit recipe=forecast_dit seed=$s run=seed$s; done
    python -m benchmarks.seeds outputs/forecast_dit/seed{0,1,2} --save forecast_dit

Each line has the lowest and highest value over the seeds.  At every operating point of the adapter stand its rivals,
untrained, plain and peers: of each method the row with the least work that is no less than the adapter's, as counted.
The last lines say whether the adapter's range of MSE lies below all of theirs, and how its accuracy is to the
baseline's.  Rivals are not trained, so a report without them (`evaluation.rivals=none`) takes those of the others, or
of other recipes' reports (`--rivals`), if it was measured on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

Row = dict[str, Any]
_POINT_OF_ACCURACY = 0.01


@dataclass(frozen=True)
class Line:
    """One method at one operating point: its row in every report that has one."""

    point: str
    method: str
    rows: list[Row]

    @property
    def kind(self) -> str:
        """As in the reports."""
        return str(self.rows[0]["kind"])

    def values(self, name: str) -> list[float]:
        """A quality of all rows; empty where it was not measured."""
        return [row["quality"][name] for row in self.rows if name in row["quality"]]


def method_of(row: Row, groups: dict[str, str]) -> str:
    """A row's name without the settings that each evaluation chooses for itself.

    Args:
        groups: the report's own, by name; reports of before it was kept have none.
    """
    order = re.search(r", order \d", row["name"])
    if row["kind"] in ("untrained", "plain", "peer") and row["name"] in groups:
        return groups[row["name"]] + (order[0] if order else "")
    if row["kind"] != "untrained":
        return str(row["name"])
    return re.split(r" every| \d", row["name"])[0] + (order[0] if order else "")


def lines_of(reports: list[dict[str, Any]], others: Sequence[dict[str, Any]] = ()) -> list[Line]:
    """Every operating point with its rivals, in the order of the first report's points; the baseline comes first.

    Args:
        others: reports of other adapters, whose rivals count too; not their own parts.
    Raises:
        ValueError: the reports are of different adapters, or of different inputs where one has no rivals.
    """
    names = [[row["name"] for row in report["rows"] if row["kind"] == "adapter"] for report in reports]
    if not names[0] or any(sorted(other) != sorted(names[0]) for other in names):
        raise ValueError(f"the reports have the adapter rows {names}: give runs of one recipe")
    compared = [report for report in reports if any(row["kind"] == "plain" for row in report["rows"])]
    inputs = [[report[key] for key in ("backbone", "seed", "inputs", "reference")] for report in [*reports, *others]]
    if (len(compared) < len(reports) or others) and any(one != inputs[0] for one in inputs):
        raise ValueError(f"rivals are of another report, and the reports of different inputs ({inputs}): measure them")
    lines = [Line("", "baseline", [row for report in reports for row in report["rows"] if row["kind"] == "baseline"])]
    for point in names[0]:
        own = [next(row for row in report["rows"] if row["name"] == point) for report in reports]
        work = max(row["work"]["blocks"] for row in own)
        rivals: dict[str, list[Row]] = {}
        for report in [*reports, *others]:
            for method, row in _rivals(report, work).items():
                if report in reports or not method.startswith("its own"):
                    rivals.setdefault(method, []).append(row)
        found = [Line(point, method, rows) for method, rows in rivals.items()]
        lines += [Line(point, point, own), *sorted(found, key=lambda line: min(line.values("mse")))]
    return lines


def _rivals(report: dict[str, Any], work: float) -> dict[str, Row]:
    """Of each method the row of a report with the least work that is no less than the adapter's."""
    found: dict[str, Row] = {}
    for row in report["rows"]:
        if row["kind"] in ("untrained", "plain", "peer") and row["work"]["blocks"] >= work:
            best = found.setdefault(method_of(row, report.get("groups", {})), row)
            found[method_of(row, report.get("groups", {}))] = min(best, row, key=lambda one: one["work"]["blocks"])
    return found


def verdicts(lines: list[Line]) -> list[tuple[bool, str]]:
    """For each operating point whether it is closer than every rival in all seeds, and as accurate, in words."""
    found = []
    for point in dict.fromkeys(line.point for line in lines if line.point):
        own, *rivals = [line for line in lines if line.point == point]
        highest, lowest = max(own.values("mse")), {line.method: min(line.values("mse")) for line in rivals}
        lost = [f"{method} ({low:.2g})" for method, low in lowest.items() if low <= highest]
        text = f"{point}: MSE at most {highest:.2g}, "
        if lost:
            text += f"overlaps with {', '.join(lost)}"
        elif rivals:
            best = min(lowest, key=lambda method: lowest[method])
            text += f"the best rival at equal or more work is {best} with at least {lowest[best]:.2g}"
        else:
            text += "and no rival at equal or more work was measured"
        won = bool(rivals) and not lost
        if own.values("accuracy"):
            behind = max(lines[0].values("accuracy")) - min(own.values("accuracy"))
            text += f"; accuracy {'within' if behind <= _POINT_OF_ACCURACY else 'NOT within'} 1 point of the baseline's"
            won = won and behind <= _POINT_OF_ACCURACY
        found.append((won, text))
    return found


def spread(values: list[float], form: str) -> str:
    """Lowest to highest."""
    if not values:
        return ""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def saved(line: Line, speed: bool) -> dict[str, Any]:
    """A line as a row of the CSV."""
    mse, psnr = line.values("mse"), line.values("psnr_db")
    return {
        "row": line.method,
        "kind": line.kind,
        "blocks": spread([row["work"]["blocks"] for row in line.rows], ".0f"),
        "speedup": f"{statistics.median(row['speedup'] for row in line.rows):.3f}" if speed else "",
        "psnr_low": f"{min(psnr):.3f}",
        "psnr_high": f"{max(psnr):.3f}",
        "accuracy": spread(line.values("accuracy"), ".3f"),
        "seeds": len(line.rows),
        "point": line.point,
        "mse_low": f"{min(mse):.3e}",
        "mse_high": f"{max(mse):.3e}",
    }


def main() -> int:
    """Print (and save) the table; 1 when the adapter does not win at every point, 2 for reports that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders that hold a report.json")
    parser.add_argument("--save", metavar="NAME", help="add to benchmarks/results/NAME.csv")
    parser.add_argument("--rivals", nargs="+", type=Path, default=[], help="run folders of other recipes")
    parser.add_argument("--no-speed", action="store_true", help="leave speedups out: the machine was busy with others")
    arguments = parser.parse_args()
    folders = [*arguments.folders, *arguments.rivals]
    if missing := [str(folder) for folder in folders if not (folder / "report.json").is_file()]:
        print(f"no report.json in {', '.join(missing)}: give run folders of trainers.fit", file=sys.stderr)
        return 2
    reports = [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in folders]
    count = len(arguments.folders)
    try:
        lines = lines_of(reports[:count], reports[count:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [saved(line, not arguments.no_speed) for line in lines]
    print("| | kind | blocks | speedup (median) | MSE | PSNR dB | accuracy | runs |\n|---|---|---|---|---|---|---|---|")
    for line, row in zip(lines, rows, strict=True):
        name, mse = (f"**{line.method}**" if line.kind == "adapter" else line.method), spread(line.values("mse"), ".2g")
        cells = [name, line.kind, row["blocks"], f"{row['speedup']}x" if row["speedup"] else "", mse]
        cells += [spread(line.values("psnr_db"), ".1f"), row["accuracy"], str(row["seeds"])]
        print("| " + " | ".join(cells) + " |")
    found = verdicts(lines)
    print("\n" + "\n".join(text for _, text in found))
    if arguments.save:
        print(results.append(arguments.save, rows))
    return 0 if all(won for won, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
