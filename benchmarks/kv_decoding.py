"""Decoding from narrow caches against the full one, by width: `python -m benchmarks.kv_decoding [NAME ...] [--save]`.

    python -m benchmarks.kv_decoding embedded:llama --contexts 2048 8192

Equal ranks, and ranks as a search finds them: another pair for every head, the mean the same.  What is decoded does not
matter for the time, so the bases are random and need no adapter.  Ratios are medians of paired rounds, in which all
caches take turns (`trainers.timing.alternate`); above 1 is faster than the full cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks import results
from modules.kv_host import attach_cache, attention_sites
from modules.kv_host.projection import ProjectionCodec, Ranks, uniform_ranks
from modules.language_models import load_model
from trainers.kv_cases import CacheCase, Reader, baseline_case, decoding
from trainers.kv_rivals import HandleReader
from trainers.timing import alternate

SHARES, TOKENS, ROUNDS = (0.5, 0.25), 16, 15


def different_ranks(sites: Sequence[Any], share: float) -> Ranks:
    """Ranks in eighths of the width, as different as a mean of `share` allows: no two heads of a layer are alike."""
    size = sites[0].head_dim
    step = size // 8
    middle = round(8 * share)
    spread = min(middle - 1, 8 - middle, 2)
    found = []
    for site in sites:
        offsets = [(head % (2 * spread + 1)) - spread for head in range(site.kv_heads)]
        keys = tuple(step * (middle + one) for one in offsets)
        found.append((keys, tuple(2 * step * middle - rank for rank in keys)))
    return tuple(found)


@contextmanager
def narrow(model: Any, codec: ProjectionCodec, context: int) -> Iterator[Reader]:
    """The model with a cache of these ranks."""
    with attach_cache(model, codec=codec) as handle:
        yield HandleReader(handle)


def cases_of(model: Any) -> list[CacheCase]:
    """The full cache, then equal and different ranks at every share."""
    sites = attention_sites(model)
    shape = (len(sites), sites[0].kv_heads, sites[0].head_dim, sites[0].head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.linalg.qr(torch.randn(shape, generator=generator))[0] for _ in range(2))
    kinds: dict[str, Callable[[float], Ranks]] = {
        "equal": lambda share: uniform_ranks(sites, round(share * shape[-1])),
        "different": partial(different_ranks, sites),
    }
    cases = [baseline_case(model)]
    for share in SHARES:
        for kind, ranks in kinds.items():
            codec = ProjectionCodec(keys, values, torch.zeros(shape[:3]), ranks(share))
            cases.append(CacheCase(name=f"{kind}, {share}", kind="untrained", enter=partial(narrow, model, codec)))
    return cases


def main() -> int:
    """Prints, and saves, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["embedded:needle", "embedded:llama"], help="backbones")
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192], help="tokens that are held")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/kv_decoding.csv")
    arguments = parser.parse_args()
    table = []
    for name in arguments.names:
        model, _ = load_model(name)
        cases = cases_of(model)
        for context in arguments.contexts:
            vocabulary = int(model.config.vocab_size)
            ids = torch.randint(2, vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
            prepared, _ = decoding(model, cases, ids, context, TOKENS)
            found = alternate(prepared, cases[0].name, device=torch.device("cpu"), rounds=ROUNDS)
            for case in cases[1:]:
                timing = found[case.name]
                low, high = (round(edge, 3) for edge in timing.speedup_range)
                row = {"backbone": name, "context": context, "ranks": case.name, "ratio": round(timing.speedup, 3)}
                row |= {"lowest": low, "highest": high}
                table.append(row)
                print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.save:
        print(f"rows added to {results.append('kv_decoding', table)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
