"""Results are rows of a CSV that say which commit and machine made them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from trainers.run_folder import code_version, devices, versions

FOLDER = Path(__file__).parent / "results"


def append(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Add rows (all with the same columns) to benchmarks/results/<name>.csv, each with commit and machine.

    Raises:
        ValueError: the file is there with other columns.
    """
    code, machine = code_version(), devices()
    where = {
        "date": date.today().isoformat(),
        "commit": f"{(code['commit'] or 'unknown')[:12]}{'-dirty' if code['dirty'] else ''}",
        "machine": " ".join([machine["machine"], f"{machine['cores']} cores", *machine["gpus"]]),
        "torch": versions().get("torch", ""),
    }
    path = FOLDER / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    if not new and (header := path.read_text(encoding="utf-8").partition("\n")[0]) != ",".join([*where, *rows[0]]):
        raise ValueError(f"{path} has the columns {header}, and not those of the new rows: give another name")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*where, *rows[0]], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows([where | dict(row) for row in rows])
    return path
