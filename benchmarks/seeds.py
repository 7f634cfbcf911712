"""One table from the reports of several training seeds: `python -m benchmarks.seeds FOLDER FOLDER ... [--save NAME]`.

    for s in 0 1 2; do python -m trainers.fit recipe=ilf_pixart seed=$s run=seed$s; done
    python -m benchmarks.seeds outputs/ilf_pixart/seed{0,1,2} --save ilf_pixart

Each line is one row with its lowest and highest value over the seeds; the last line says whether the adapter's range
of PSNR lies above that of every plain and untrained row that is not faster than it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import results


def method_of(row: dict[str, Any]) -> str:
    """A row's name without the settings that each evaluation chooses for itself."""
    if row["kind"] != "untrained":
        return str(row["name"])
    order = re.search(r"order \d", row["name"])
    return re.split(r" every| \d", row["name"])[0] + (f", {order[0]}" if order else "")


def gather(folders: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Rows of all reports by method, in the order of the first report."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for folder in folders:
        for row in json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]:
            found[method_of(row)].append(row)
    return dict(found)


def spread(values: list[float], digits: int) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def main() -> int:
    """Print (and save) the table; 1 when the adapter does not win."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders that hold a report.json")
    parser.add_argument("--save", metavar="NAME", help="add to benchmarks/results/NAME.csv")
    arguments = parser.parse_args()
    if missing := [str(folder) for folder in arguments.folders if not (folder / "report.json").is_file()]:
        print(f"no report.json in {', '.join(missing)}: give run folders of trainers.fit", file=sys.stderr)
        return 2
    methods = gather(arguments.folders)
    (name, own), *_ = [(n, rows) for n, rows in methods.items() if rows[0]["kind"] == "adapter"]
    print("| | kind | blocks | speedup (median) | PSNR dB | accuracy |\n|---|---|---|---|---|---|")
    saved, rivals = [], {}
    for method, rows in methods.items():
        speed = statistics.median(row["speedup"] for row in rows)
        psnr = [row["quality"]["psnr_db"] for row in rows]
        accuracy = spread([row["quality"].get("accuracy", float("nan")) for row in rows], 3)
        blocks = spread([row["work"]["blocks"] for row in rows], 0)
        print(f"| {method} | {rows[0]['kind']} | {blocks} | {speed:.2f}x | {spread(psnr, 2)} | {accuracy} |")
        saved.append(
            {"row": method, "kind": rows[0]["kind"], "blocks": blocks, "speedup": f"{speed:.3f}",
             "psnr_low": f"{min(psnr):.3f}", "psnr_high": f"{max(psnr):.3f}", "accuracy": accuracy, "seeds": len(rows)}
        )  # fmt: skip
        if (
            rows[0]["kind"] in ("plain", "untrained")
            and min(r["work"]["blocks"] for r in rows) >= own[0]["work"]["blocks"]
        ):
            rivals[method] = max(psnr)
    lowest = min(row["quality"]["psnr_db"] for row in own)
    lost = [f"{method} ({best:.2f})" for method, best in rivals.items() if best >= lowest]
    verdict = f"loses to {', '.join(lost)}" if lost else "above the highest of every plain and untrained row"
    print(f"\n{name}: lowest {lowest:.2f} dB; at equal or higher latency {verdict}")
    if arguments.save:
        print(results.append(arguments.save, saved))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
