"""What a Locret adapter is measured against: the full cache and every untrained selector at as many units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from trainers.evaluation import Measured, Request
from trainers.kv_cases import CacheCase, Reader
from trainers.kv_evaluation import Load, measure_adapter
from trainers.kv_rivals import SHARES, HandleReader, budget_of, selector_cases


def measure(request: Request) -> Measured:
    """See `trainers.kv_evaluation.measure_adapter`."""
    return measure_adapter(request, _own_cases, _rival_cases)


def _own_cases(load: Load, tensors: dict[str, Tensor]) -> list[CacheCase]:
    return [
        CacheCase(
            name=f"Locret, {share:.4g}", kind="adapter", enter=partial(_kept, load, share), group="Locret", share=share
        )
        for share in SHARES
    ]


def _rival_cases(model: Any, tensors: dict[str, Tensor]) -> list[CacheCase]:
    return selector_cases(model)


@contextmanager
def _kept(load: Load, share: float, context: int) -> Iterator[Reader]:
    with load() as handle:
        handle.use(budget=budget_of(share, context), stabilizers=0, local=0, query_first=False)
        yield HandleReader(handle)
