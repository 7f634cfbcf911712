"""Seconds until a command answers: `python -m benchmarks.startup [--save]`.

Bars: `trainers.fit --help` in 1.5 s, `--print` of any recipe in 2.5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results
from trainers import recipes

ROUNDS = 5
HELP_SECONDS, PRINT_SECONDS = 1.5, 2.5


def seconds(*words: str) -> list[float]:
    """Wall clock of `python -m trainers.fit words`, one number a round, sorted."""
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        command = [sys.executable, "-m", "trainers.fit", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        found.append(time.perf_counter() - started)
    return sorted(found)


def main() -> int:
    """Time every answer; returns 1 when a median is over its bar."""
    cases = [(("--help",), HELP_SECONDS), (("--list",), HELP_SECONDS)]
    cases += [((f"recipe={name}", "--print"), PRINT_SECONDS) for name in recipes.available()]
    rows = []
    for words, bar in cases:
        found = seconds(*words)
        median = statistics.median(found)
        rows.append(
            {"command": " ".join(words), "median_s": f"{median:.2f}", "worst_s": f"{found[-1]:.2f}", "bar_s": bar}
        )
        print(f"{rows[-1]['command']:45} {median:.2f} s, worst of {ROUNDS} {found[-1]:.2f} s, bar {bar} s")
    if "--save" in sys.argv:
        print(f"rows added to {results.append('startup', rows)}")
    return int(any(float(row["median_s"]) > row["bar_s"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
