"""The untrained ways to keep less of a cache, as cases of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from modules.contracts import TokenSelector
from modules.kv_host import CachePolicy, KVHandle, attach_cache
from modules.token_selectors import ExpectedAttention, KeyDifference, KeyNorm, Random, SinkAndWindow, SnapKV
from trainers.kv_cases import CacheCase, Reader

SHARES = (1 / 16, 1 / 8, 1 / 4)
STABILIZERS = 2
"""A needle that a chunk's end cuts in two is lost by whoever gives up its first half."""


def selector_cases(model: Any) -> list[CacheCase]:
    """Every untrained selector that the backbone allows, at every share of the tokens."""
    makers: dict[str, Callable[[], TokenSelector]] = {
        "expected attention": partial(ExpectedAttention, model),
        "SnapKV": partial(SnapKV, window=8),  # a window of 32 would be all that the smallest budget keeps
        "KeyDiff": KeyDifference,
        "sink and window": SinkAndWindow,
        "key norm": KeyNorm,
        "random": Random,
    }
    try:
        makers["expected attention"]()
    except ValueError:  # without one fixed rotation nothing can be expected
        del makers["expected attention"]
    return [
        CacheCase(
            name=f"{name}, {share:.4g}",
            kind="untrained",
            enter=partial(_selected, model, make, share),
            group=name,
            share=share,
        )
        for share in SHARES
        for name, make in makers.items()
    ]


@contextmanager
def _selected(model: Any, make: Callable[[], TokenSelector], share: float, context: int) -> Iterator[Reader]:
    with attach_cache(model, selector=make(), policy=CachePolicy(**policy_of(share, context))) as handle:
        yield HandleReader(handle)


def policy_of(share: float, context: int) -> dict[str, int]:
    """Of a policy, what all selectors are given alike."""
    budget = budget_of(share, context)
    return {"budget": budget, "stabilizers": min(STABILIZERS, budget - 1)}


def budget_of(share: float, context: int) -> int:
    """Units that a share of a context is."""
    return max(1, round(share * context))


class HandleReader:
    """Reads contexts as a handle's policy says, but for the chunk."""

    def __init__(self, handle: KVHandle) -> None:
        self.handle = handle

    def read(self, ids: Tensor, chunk: int | None) -> Any:
        """See `trainers.kv_cases.Reader`."""
        return self.handle.prefill(ids, chunk=chunk)

    def copied(self, cache: Any) -> Any:
        """See `trainers.kv_cases.Reader`."""
        return self.handle.resume(cache)
