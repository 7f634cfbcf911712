"""Measures caches against one another: what can be predicted from what is left, bytes really held, time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from data.contexts import ContextRows
from data.stepped import step_generator
from data.text import IGNORED
from modules.kv_host import KVCache
from modules.kv_host.cache import repeated
from trainers.config import Evaluation
from trainers.rows import Kind, Row
from trainers.timing import Timing, alternate, peak_memory


class Reader(Protocol):
    """How a case reads contexts."""

    def read(self, ids: Tensor, chunk: int | None) -> Any:
        """The cache after reading ids [B, C], so many at a time or all at once."""

    def copied(self, cache: Any) -> Any:
        """A cache of this case, to go on from without changing it."""


TIMED_CHUNK = 1024
_FEW = 256  # tokens that are really read before a cache is filled up


@dataclass(frozen=True, kw_only=True)
class CacheCase:
    """One way to keep a context.

    Attributes:
        enter: given the length of the context, sets the shared model up, yields how a context is read, and undoes it.
        group: cases of one group are one method at several sizes.
        share: of the tokens, or of the width, that is kept.
    """

    name: str
    kind: Kind
    enter: Callable[[int], AbstractContextManager[Reader]]
    group: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Kept:
    """What a case makes of contexts.

    accuracy: share of the following tokens, those that are asked for, that are the model's first choice.
    perplexity: of them.
    units: mean over the layers of units per head after reading.  bytes: of one row's cache.  peak: most units.
    """

    accuracy: float
    perplexity: float
    units: float
    bytes: float
    peak: int


@torch.no_grad()
def quality_of(
    model: Any,
    case: CacheCase,
    batches: Sequence[ContextRows],
    chunk: int | None = None,
    budget_of: int | None = None,
) -> Kept:
    """Reads every context, cuts it down, and predicts what follows from what is left.

    Args:
        chunk: tokens that are read at a time; None takes a context at once.
        budget_of: length whose share is kept, where that is not the contexts' own.
    """
    nats, hits, count, units, size, rows, peak = 0.0, 0, 0, 0.0, 0, 0, 0
    with case.enter(budget_of or batches[0].context) as reader:
        for batch in batches:
            ids = batch.input_ids.to(model.device)
            cache = reader.read(ids[:, : batch.context], chunk)
            size += cache_bytes(cache)
            held = cache.units() if isinstance(cache, KVCache) else [cache.get_seq_length()]
            units += len(batch) * sum(held) / len(held)
            peak = max(peak, *(cache.peak_units() if isinstance(cache, KVCache) else held))
            place = torch.arange(batch.context, ids.shape[1], device=ids.device).expand(len(ids), -1)
            call = {"past_key_values": cache, "position_ids": place, "use_cache": True}
            logits = model(input_ids=ids[:, batch.context :], **call).logits[:, :-1]
            wanted = batch.labels[:, batch.context + 1 :].to(model.device)
            asked = wanted != IGNORED
            logits, wanted = logits[asked].float(), wanted[asked]
            nats += float(functional.cross_entropy(logits, wanted, reduction="sum"))
            hits += int((logits.argmax(-1) == wanted).sum())
            count, rows = count + len(wanted), rows + len(batch)
    return Kept(hits / count, math.exp(nats / count), units / rows, size / rows, peak)


def cache_bytes(cache: Any) -> int:
    """Bytes of the storages that a cache holds."""
    if isinstance(cache, KVCache):
        return cache.memory_bytes()
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def measure_cases(
    model: Any,
    cases: Sequence[CacheCase],
    batches: Sequence[ContextRows],
    *,
    settings: Evaluation,
    notify: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Quality on held-out contexts, each read at once; time and peak memory on one long context of random tokens.

    The rows' speedup is that of decoding: `new_tokens` calls of the model behind the first of `timing_contexts` held or
    evicted tokens, the cases alternating (`trainers.timing.alternate`).  Prefill is timed of the baseline and of
    adapters.

    Args:
        cases: the first one is the baseline.
        settings: `timing_contexts`, `new_tokens`, `repeats` and `seed` are used.
    Returns:
        the rows, and by length and case what decoding takes behind every one of the contexts.
    """
    kept = {}
    for number, case in enumerate(cases, 1):
        notify(f"quality of {case.name} ({number}/{len(cases)})")
        kept[case.name] = quality_of(model, case, batches)
    generator = step_generator("timing", settings.seed)
    vocabulary, lengths = int(model.config.vocab_size), settings.timing_contexts
    ids = torch.randint(2, vocabulary, (1, lengths[0]), generator=generator).to(model.device)
    notify(f"reading {lengths[0]} tokens, {settings.repeats} rounds")
    timed = {"baseline": cases[0].name, "device": model.device, "rounds": settings.repeats, "seed": settings.seed}
    own = [case for case in cases if case.kind in ("baseline", "adapter")]
    prefill = alternate({case.name: _prefill(case, ids) for case in own}, **timed)
    memory = {case.name: _peak(case, ids, model.device) for case in cases}
    speeds, tokens = {}, settings.new_tokens
    for length in lengths:
        notify(f"decoding {tokens} tokens behind {length} in {len(cases)} ways, {settings.repeats} rounds")
        prepared, sizes = decoding(model, cases, ids, length, tokens)
        speeds[length] = {name: (timing, sizes[name]) for name, timing in alternate(prepared, **timed).items()}
    rows = [
        _row(case, kept[case.name], prefill.get(case.name), speeds[lengths[0]][case.name][0], memory[case.name], tokens)
        for case in cases
    ]
    return rows, {
        str(length): {name: _speed(timing, size, tokens) for name, (timing, size) in found.items()}
        for length, found in speeds.items()
    }


def decoding(
    model: Any, cases: Sequence[CacheCase], ids: Tensor, length: int, tokens: int
) -> tuple[dict[str, Callable[[], AbstractContextManager[Callable[[], object]]]], dict[str, int]]:
    """By case, what `trainers.timing.alternate` times, and the bytes that are held meanwhile.

    Timed are `tokens` calls of the model behind what a case keeps of `length` tokens, see `filled_cache`.
    """
    caches = {}
    for case in cases:
        with case.enter(length) as reader:
            caches[case.name] = filled_cache(reader, ids, length)
    prepared = {case.name: _decode(model, case, caches[case.name], ids, length, tokens) for case in cases}
    return prepared, {name: cache_bytes(cache) for name, cache in caches.items()}


def filled_cache(reader: Reader, ids: Tensor, length: int) -> Any:
    """A cache that holds as much as after reading `length` tokens, from a few that are read.

    How long decoding takes, and what is held, depends on sizes and not on values; a full cache of a long text takes
    minutes to read.
    """
    cache = reader.read(ids[:, : min(_FEW, length)], None)
    if isinstance(cache, KVCache):
        cache.stretch(length)
        return cache
    if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a window's layers hold what they hold
        again = ids[:, torch.arange(length, device=ids.device) % ids.shape[1]]
        return reader.read(again, TIMED_CHUNK)
    for layer in cache.layers:
        layer.keys, layer.values = (repeated(states, length) for states in (layer.keys, layer.values))
    return cache


def _speed(timing: Timing, size: int, tokens: int) -> dict[str, Any]:
    return {
        "speedup": timing.speedup,
        "speedup_range": list(timing.speedup_range),
        "tokens_per_s": tokens / timing.latency_s,
        "cache_bytes": size,
    }


def _row(case: CacheCase, kept: Kept, prefill: Timing | None, decode: Timing, memory: int, tokens: int) -> Row:
    read = {} if prefill is None else {"prefill_speedup": prefill.speedup}
    return Row(
        name=case.name,
        kind=case.kind,
        group=case.group or case.name,
        speedup=decode.speedup,
        speedup_range=decode.speedup_range,
        latency_s=decode.latency_s / tokens,
        work={
            "kept_units": kept.units,
            "cache_bytes": kept.bytes,
            **read,
            "tokens_per_s": tokens / decode.latency_s,
        },
        memory_bytes=memory,
        quality={"accuracy": kept.accuracy, "perplexity": kept.perplexity},
    )


def _prefill(case: CacheCase, ids: Tensor) -> Callable[[], AbstractContextManager[Callable[[], object]]]:
    @contextmanager
    def prepare() -> Iterator[Callable[[], object]]:
        with case.enter(ids.shape[1]) as reader:
            yield lambda: reader.read(ids, TIMED_CHUNK)

    return prepare


def _decode(
    model: Any, case: CacheCase, cache: Any, ids: Tensor, length: int, tokens: int
) -> Callable[[], AbstractContextManager[Callable[[], object]]]:
    @torch.no_grad()
    def decode(own: Any) -> None:
        token = ids[:, -1:]
        for _ in range(tokens):
            token = model(input_ids=token, past_key_values=own, use_cache=True).logits.argmax(-1)

    @contextmanager
    def prepare() -> Iterator[Callable[[], object]]:
        with case.enter(length) as reader:
            own = reader.copied(cache)
            yield lambda: decode(own)

    return prepare


def _peak(case: CacheCase, ids: Tensor, device: torch.device) -> int:
    with _prefill(case, ids)() as call:
        return peak_memory(call, device)


class _Full:
    """transformers' own cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def read(self, ids: Tensor, chunk: int | None) -> Any:
        cache = DynamicCache(config=self.model.config)
        for part in ids.split(chunk or ids.shape[1], dim=1):
            self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def copied(self, cache: Any) -> Any:
        return copy.deepcopy(cache)


def baseline_case(model: Any) -> CacheCase:
    """transformers' own cache, which keeps everything."""

    @contextmanager
    def enter(context: int) -> Iterator[Reader]:
        yield _Full(model)

    return CacheCase(name="full cache", kind="baseline", enter=enter)
