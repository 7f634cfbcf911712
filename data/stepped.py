"""Batches that are a function of the seed and the step alone, so that a resumed run reads what the first would have.

A loader's own state (epoch, shuffle, workers' prefetch) never matters: batch `n` is asked for by number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts; near parts give unrelated seeds, on every platform the same."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own for what `parts` name, as `step_generator(seed, "noise", step)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=step_generator(seed, "order", epoch))


@dataclass(frozen=True, kw_only=True)
class StepOrder:
    """Which samples batch `n` holds.

    An endless stream, each sample once per epoch in an order of its own; a batch may reach over an epoch's end, and
    the ranks share each stretch of the stream, so that no sample is seen twice in an epoch.  A run that goes on with
    another number of ranks, or other batches, begins at batch `first` where `before` samples have been drawn.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    first: int = 0
    before: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1:
            raise ValueError(f"{self.length} samples in batches of {self.batch_size}: both must be at least 1")

    def position(self, number: int) -> int:
        """How many samples all ranks together have drawn before batch `number`."""
        return self.before + (number - self.first) * self.world_size * self.batch_size

    def indices(self, number: int) -> Tensor:
        """Sample numbers of batch `number` on this rank, int64 [batch_size]."""
        position = self.position(number) + self.rank * self.batch_size
        missing, parts = self.batch_size, []
        while missing:
            epoch, offset = divmod(position, self.length)
            part = _permutation(self.length, self.seed, epoch)[offset : offset + missing]
            parts.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(parts)


class SteppedBatches(IterableDataset[Any]):
    """Batches number `start`, `start + 1`, ... for ever; workers take turns, and the order stays the same."""

    def __init__(self, fetch: Callable[[Tensor], Any], order: StepOrder, start: int = 0) -> None:
        self.fetch, self.order, self.start = fetch, order, start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.fetch(self.order.indices(number))
            number += stride


def stepped_loader(
    fetch: Callable[[Tensor], Any], order: StepOrder, start: int = 0, num_workers: int = 0
) -> DataLoader[Any]:
    """An endless loader that begins with batch `start`.

    Args:
        fetch: sample numbers [batch_size] -> batch.  It must not draw from the global random generators; noise that
            belongs to a batch comes from `step_generator`.
    """
    # The loader draws a base seed when it is iterated; with a generator of its own the global one is left alone.
    own = torch.Generator().manual_seed(order.seed)
    batches = SteppedBatches(fetch, order, start)
    return DataLoader(
        batches, batch_size=None, num_workers=num_workers, generator=own, pin_memory=torch.cuda.is_available()
    )
