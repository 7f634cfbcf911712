"""Peak memory of reading a prompt with a budget, by its length: `python -m benchmarks.kv_memory [--save]`.

Each length is read by a process of its own, once with the full cache and once in chunks with a budget, so that neither
finds memory that another has left.  The embedded llama is used far beyond the length that it was trained for: bytes do
not depend on what it says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from benchmarks import results
from modules.kv_host import CachePolicy, attach_cache
from modules.language_models import load_model
from modules.token_selectors import SinkAndWindow
from trainers.kv_cases import cache_bytes
from trainers.timing import peak_memory

LENGTHS, BUDGET, CHUNK = (512, 2048, 8192), 256, 256


def read(length: int, budget: int) -> tuple[int, int, int]:
    """Peak bytes of the process above those before, bytes of the cache, and most units of a layer; budget 0 is full."""
    model, _ = load_model("embedded:llama")
    ids = torch.randint(2, 4096, (1, length), generator=torch.Generator().manual_seed(0))
    policy = CachePolicy(budget=budget or None, chunk=CHUNK)
    with attach_cache(model, selector=SinkAndWindow(), policy=policy) as handle:
        handle.prefill(ids[:, : 2 * CHUNK])  # what is loaded on the first call is no part of the prompt's memory
        before = peak_memory(lambda: None, torch.device("cpu"))
        peak = peak_memory(lambda: handle.prefill(ids), torch.device("cpu"))
        cache = handle.host.last
        assert cache is not None
        return peak - before, cache_bytes(cache), max(cache.peak_units())


def main() -> int:
    """Prints, and saves, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int, metavar=("LENGTH", "BUDGET"), help="one line, in this process")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/kv_memory.csv")
    arguments = parser.parse_args()
    if arguments.one:
        print(*read(*arguments.one))
        return 0
    table = []
    for length in LENGTHS:
        for budget in (0, BUDGET):
            command = [sys.executable, "-m", "benchmarks.kv_memory", "--one", str(length), str(budget)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            grown, held, units = map(int, done.stdout.split()[-3:])
            row = {"length": length, "budget": budget or "all", "chunk": CHUNK, "peak_bytes": grown,
                   "cache_bytes": held, "peak_units": units}  # fmt: skip
            table.append(row)
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.save:
        print(f"rows added to {results.append('kv_memory', table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
