"""kvpress's presses beside the selectors of this package, in one process: `python -m benchmarks.kv_presses [--save]`.

    pip install kvpress   # in an environment of its own: it wants an older transformers than this package
    python -m benchmarks.kv_presses --adapter outputs/locret_needle/000/adapter --save

Rows of needles are read at once and cut to a sixteenth, an eighth and a quarter; each line is the accuracy of the
answers and the bytes that are really held.  kvpress 0.5 asks its layers for `cache_position`, which transformers no
longer hands them: a hook puts it back.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from afterburner import load_adapter
from benchmarks import results
from modules.kv_host import attention_sites
from modules.kv_host.interface import register
from modules.language_models import load_model
from trainers.contexts import held_out_rows
from trainers.kv_cases import CacheCase, Reader, baseline_case, quality_of
from trainers.kv_rivals import SHARES, HandleReader, budget_of, selector_cases

PRESSES = (
    "ExpectedAttentionPress", "SnapKVPress", "PyramidKVPress", "KeyDiffPress", "TOVAPress", "StreamingLLMPress",
    "KnormPress", "LagKVPress", "LeverageScorePress", "NonCausalAttnPress", "CompactorPress", "CURPress", "RandomPress",
)  # fmt: skip
CONTEXT = 512


def press_cases(model: Any) -> list[CacheCase]:
    """Every press at every share; none without kvpress."""
    try:
        import kvpress
    except ImportError as error:
        print(f"kvpress is not here, so only this package's members are measured: {error}", file=sys.stderr)
        return []
    register()  # kvpress has wrapped every attention function, and its wrapper reads keys as tensors
    return [
        CacheCase(name=f"kvpress {name}, {share:.4g}", kind="peer", enter=partial(_pressed, model, press, share))
        for share in SHARES
        for name in PRESSES
        if (press := getattr(kvpress, name, None)) is not None
    ]


class _Pressed:
    def __init__(self, model: Any, press: Any) -> None:
        self.model, self.press = model, press

    @torch.no_grad()
    def read(self, ids: Tensor, chunk: int | None) -> Any:
        cache = DynamicCache()
        with self.press(self.model):
            self.model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def copied(self, cache: Any) -> Any:
        return copy.deepcopy(cache)


@contextmanager
def _pressed(model: Any, press: Any, share: float, context: int) -> Iterator[Reader]:
    def position(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "cache_position": kwargs["position_ids"][0]}

    hooks = [site.module.register_forward_pre_hook(position, with_kwargs=True) for site in attention_sites(model)]
    try:
        yield _Pressed(model, press(compression_ratio=1 - share))
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _adapted(model: Any, adapter: str, share: float, context: int) -> Iterator[Reader]:
    with load_adapter(model, adapter) as handle:
        handle.use(budget=budget_of(share, context), stabilizers=0, local=0, query_first=False)  # type: ignore[attr-defined]
        yield HandleReader(handle)  # type: ignore[arg-type]


def main() -> int:
    """Prints, and saves, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="a locret adapter of embedded:needle")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/kv_presses.csv")
    arguments = parser.parse_args()
    model, tokenizer = load_model("embedded:needle")
    rows = held_out_rows("needle", tokenizer, CONTEXT, arguments.rows, 16)
    cases = [baseline_case(model), *selector_cases(model), *press_cases(model)]
    if arguments.adapter:
        cases += [
            CacheCase(
                name=f"Locret, {share:.4g}", kind="adapter", enter=partial(_adapted, model, arguments.adapter, share)
            )
            for share in SHARES
        ]
    table = []
    for case in cases:
        try:
            kept = quality_of(model, case, rows)
        except Exception as error:  # a press of another version fails in its own ways, which is part of the result
            print(f"{case.name:45} {type(error).__name__}: {error}")
            continue
        print(f"{case.name:45} accuracy {kept.accuracy:.3f}  units {kept.units:7.1f}  bytes {kept.bytes:9.0f}")
        table.append({"name": case.name, "accuracy": f"{kept.accuracy:.4f}", "bytes": round(kept.bytes)})
    if arguments.save:
        print(f"rows added to {results.append('kv_presses', table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
