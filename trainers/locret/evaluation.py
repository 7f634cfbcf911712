"""What a Locret adapter is measured against: the full cache and every untrained selector at as many units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from trainers.evaluation import Measured, Request
from trainers.kv_cases import CacheCase, Reader
from trainers.kv_evaluation import CHUNK, NEEDLE_CONTEXT, Load, Reading, measure_adapter
from trainers.kv_rivals import SHARES, HandleReader, policy_of, selector_cases


def decoys_in(context: int) -> int:
    """As many as take up a third of it."""
    return context // 9


def _smallest(case: CacheCase) -> bool:
    return case.share == SHARES[0]


_LONG = (1024, 2000)  # the embedded model was trained up to 2,024 tokens
READINGS = (
    Reading(name="decoys", decoys=decoys_in(NEEDLE_CONTEXT)),
    Reading(name="decoys, in chunks", decoys=decoys_in(NEEDLE_CONTEXT), chunk=CHUNK),
    Reading(name="decoys, shifted, in chunks", decoys=decoys_in(NEEDLE_CONTEXT), chunk=CHUNK, style="shifted"),
    *(
        Reading(
            name=f"decoys, {length} tokens, in chunks",
            length=length,
            decoys=decoys_in(length),
            chunk=CHUNK,
            fixed=True,
            measured=_smallest,
        )
        for length in _LONG
    ),
)
"""Who spends units on what nobody asks for has too few for what is asked: see `data/needle.py`."""


_KNOWN = {"known": True, "needles": 24, "questions": 1}


def measure(request: Request) -> Measured:
    """See `trainers.kv_evaluation.measure_adapter`.

    Heads that have read the question first are asked for one of many needles, by contexts that end with it.
    """
    known = request.manifest.module["policy"].get("query_first")
    more: dict[str, Any] = {"needles": _KNOWN} if known else {"readings": READINGS}
    return measure_adapter(request, own_cases, lambda model, _: selector_cases(model), **more)


def own_cases(load: Load, tensors: dict[str, Tensor]) -> list[CacheCase]:
    """The adapter at every share."""
    return [
        CacheCase(
            name=f"Locret, {share:.4g}", kind="adapter", enter=partial(_kept, load, share), group="Locret", share=share
        )
        for share in SHARES
    ]


@contextmanager
def _kept(load: Load, share: float, context: int) -> Iterator[Reader]:
    with load() as handle:
        local = handle.policy.local if handle.policy.query_first else 0
        handle.use(**policy_of(share, context), local=local)
        yield HandleReader(handle)
