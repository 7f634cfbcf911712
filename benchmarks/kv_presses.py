"""kvpress's presses beside the selectors of this package, in one process: `python -m benchmarks.kv_presses [--save]`.

    pip install kvpress   # in an environment of its own: it wants an older transformers than this package
    python -m benchmarks.kv_presses --adapter outputs/locret_needle/000/adapter --save

Rows of needles, without and with decoys (`data/needle.py`), are cut to a sixteenth, an eighth and a quarter, once read
as a whole and once in chunks with the budget kept after each; every line is the accuracy of the answers and the bytes
that are really held.  kvpress knows no chunks: here a chunk is to a press what a prompt is, with the units that were
kept before it in front.  kvpress 0.5 asks its layers for `cache_position`, which transformers no longer hands them: a
hook puts it back.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from afterburner import load_adapter
from benchmarks import results
from data.contexts import ContextRows
from modules.kv_host import attention_sites
from modules.language_models import load_model
from trainers.contexts import held_out_rows
from trainers.kv_cases import CacheCase, Reader, baseline_case, quality_of
from trainers.kv_evaluation import CHUNK, NEEDLE_CONTEXT
from trainers.kv_rivals import SHARES, budget_of, selector_cases
from trainers.locret.evaluation import decoys_in, own_cases

PRESSES: dict[str, dict[str, Any]] = {
    "ExpectedAttentionPress": {},
    # By default these keep a window that is larger than the smallest budget.
    "SnapKVPress": {"window_size": 8},
    "PyramidKVPress": {"window_size": 8},
    "LagKVPress": {"lag_size": 16},
    **dict.fromkeys(("KeyDiffPress", "TOVAPress", "StreamingLLMPress", "KnormPress", "LeverageScorePress"), {}),
    **dict.fromkeys(("NonCausalAttnPress", "CompactorPress", "CURPress", "RandomPress"), {}),
}
WRAPPERS = ("AdaKVPress", "CriticalKVPress", "CriticalAdaKVPress", "ChunkKVPress")
"""Around expected attention; those with Ada mask what they give up, and hold it."""


def press_makers() -> dict[str, Callable[[], Any]]:
    """Every press by its name; none without kvpress."""
    try:
        import kvpress
    except ImportError as error:
        print(f"kvpress is not here, so only this package's members are measured: {error}", file=sys.stderr)
        return {}
    makers: dict[str, Callable[[], Any]] = {
        name + "".join(f"({key}={value})" for key, value in settings.items()): partial(made, **settings)
        for name, settings in PRESSES.items()
        if (made := getattr(kvpress, name, None)) is not None
    }
    for name in WRAPPERS:
        if (wrapper := getattr(kvpress, name, None)) is not None:
            inner = partial(kvpress.ExpectedAttentionPress, use_vnorm="Critical" not in name)  # those have their own
            makers[f"{name}(ExpectedAttentionPress)"] = partial(_wrapped, wrapper, inner)
    return makers


def _wrapped(wrapper: Any, inner: Callable[[], Any]) -> Any:
    return wrapper(press=inner())


def press_cases(model: Any) -> list[CacheCase]:
    """Every press at every share."""
    return [
        CacheCase(
            name=f"kvpress {name}, {share:.4g}",
            kind="peer",
            enter=partial(_pressed, model, make, share),
            group=f"kvpress {name}",
            share=share,
        )
        for share in SHARES
        for name, make in press_makers().items()
    ]


class _Pressed:
    def __init__(self, model: Any, press: Any, budget: int) -> None:
        self.model, self.press, self.budget = model, press, budget

    @torch.no_grad()
    def read(self, ids: Tensor, chunk: int | None) -> Any:
        cache, start = DynamicCache(), 0
        with self.press(self.model):
            for part in ids.split(chunk or ids.shape[1], dim=1):
                held = cache.get_seq_length() + part.shape[1]
                # Presses take the integer part of what they keep.
                self.press.compression_ratio = max(0.0, 1 - (self.budget + 0.5) / held)
                place = torch.arange(start, start + part.shape[1]).expand(len(ids), -1)
                self.model.model(input_ids=part, position_ids=place, past_key_values=cache, use_cache=True)
                start += part.shape[1]
        return cache

    def copied(self, cache: Any) -> Any:
        return copy.deepcopy(cache)


@contextmanager
def _pressed(model: Any, make: Callable[[], Any], share: float, context: int) -> Iterator[Reader]:
    def position(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # By this presses tell a prompt from decoding: its places begin at 0.
        return args, {**kwargs, "cache_position": torch.arange(kwargs["hidden_states"].shape[1])}

    torch.manual_seed(0)  # some presses draw numbers
    modules = [site.module for site in attention_sites(model)]
    hooks = [module.register_forward_pre_hook(position, with_kwargs=True) for module in modules]
    try:
        yield _Pressed(model, make(), budget_of(share, context))
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            module.masked_key_indices = None


def measured(
    model: Any, cases: Sequence[CacheCase], rows: Sequence[ContextRows], decoys: int, chunk: int | None
) -> list[dict[str, Any]]:
    """A line of the table for every case that runs."""
    table = []
    for case in cases:
        try:
            kept = quality_of(model, case, rows, chunk)
        except Exception as error:  # a press of another version fails in its own ways, which is part of the result
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{case.name:60} {reason}", flush=True)
            continue
        print(
            f"{case.name:60} accuracy {kept.accuracy:.3f}  units {kept.units:6.1f}  bytes {kept.bytes:8.0f}", flush=True
        )
        table.append(
            {"decoys": decoys, "chunk": chunk or "all", "name": case.group or case.name, "share": f"{case.share:.4g}",
             "accuracy": f"{kept.accuracy:.4f}", "units": f"{kept.units:.1f}", "bytes": round(kept.bytes),
             "peak_units": kept.peak, "answers": 8 * sum(map(len, rows))}
        )  # fmt: skip
    return table


def main() -> int:
    """Prints, and saves, the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="a locret adapter of embedded:needle")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows")
    parser.add_argument("--save", action="store_true", help="add to benchmarks/results/kv_presses.csv")
    arguments = parser.parse_args()
    model, tokenizer = load_model("embedded:needle")
    cases = [baseline_case(model)]
    if arguments.adapter:
        cases += own_cases(partial(load_adapter, model, arguments.adapter), {})
    cases += [*selector_cases(model), *press_cases(model)]
    table = []
    for decoys in (0, decoys_in(NEEDLE_CONTEXT)):
        rows = held_out_rows("needle", tokenizer, NEEDLE_CONTEXT, arguments.rows, 16, decoys=decoys)
        for chunk in (None, CHUNK):
            print(f"\n{decoys} decoys, {'read at once' if chunk is None else f'in chunks of {chunk}'}")
            table += measured(model, cases, rows, decoys, chunk)
    if arguments.save:
        print(f"rows added to {results.append('kv_presses', table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
