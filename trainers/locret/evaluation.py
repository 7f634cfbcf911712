"""What a Locret adapter is measured against: the full cache and every untrained selector at as many units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from checkpoints.load import read_tensors
from checkpoints.manifest import check_valid_for
from data.contexts import ContextRows
from modules.language_models import load_model
from modules.locret import LocretHandle, attach
from trainers.cache_cases import CacheCase, Read, baseline_case, measure_cases, quality_of
from trainers.cache_rivals import SHARES, budget_of, reader, selector_cases
from trainers.context_settings import NEEDLE
from trainers.contexts import held_out_rows
from trainers.evaluation import Measured, Request
from trainers.verdict import equal_memory_verdict

_CHUNK = 64  # of the rows that show chunked reading on short contexts
_CONTEXTS = {NEEDLE: 512}


def measure(request: Request) -> Measured:
    """Quality of what follows a context, from what is kept of it, with bytes really held and time.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    manifest, tensors = request.manifest, read_tensors(request.adapter)
    settings = request.config.evaluation
    model, tokenizer = load_model(request.backbone, request.revision, request.config.dtype)
    model.to(request.device)
    check_valid_for(manifest, model)
    source = settings.prompts or (NEEDLE if request.backbone == "embedded:needle" else "stdlib")
    longest = int(model.config.max_position_embeddings)
    context = _CONTEXTS.get(source, 3 * min(longest, 4096) // 4)
    held_out = partial(held_out_rows, source, tokenizer, count=settings.inputs, batch_size=settings.batch_size)
    batches = held_out(context=context, seed=settings.seed)
    load = partial(attach, model, manifest, tensors)
    own = [_adapter_case(load, share) for share in SHARES]
    cases = [baseline_case(model), *own, *selector_cases(model)]
    rows = measure_cases(model, cases, batches, settings=settings, notify=request.notify)
    request.notify("reading in chunks, and other contexts")
    metric = "accuracy" if source == NEEDLE else "perplexity"
    facts: dict[str, Any] = {
        "inputs": sum(map(len, batches)),
        "context": context,
        "timing_batch": 1,
        "timing_context": settings.timing_context,
        "reference": "the backbone with its full cache",
        "in_chunks": _in_chunks(model, own, batches, metric),
    }
    if source == NEEDLE:
        facts["shifted"] = {
            str(length): _by_case(model, [cases[0], *own], held_out(context=length, style="shifted"), metric)
            for length in (context, 2 * context)
        }
    return Measured(
        rows=rows, verdict=equal_memory_verdict(rows, metric), facts=facts, plotted=metric, against="cache_bytes"
    )


def _adapter_case(load: Callable[[], LocretHandle], share: float) -> CacheCase:
    @contextmanager
    def enter(context: int) -> Iterator[Read]:
        with load() as handle:
            handle.use(budget=budget_of(share, context), stabilizers=0, local=0, query_first=False)
            yield reader(handle)

    return CacheCase(name=f"Locret, {share:.4g}", kind="adapter", enter=enter, group="Locret", share=share)


def _in_chunks(model: Any, cases: Sequence[CacheCase], batches: Sequence[ContextRows], metric: str) -> dict[str, Any]:
    """Quality and most units held where contexts are read in chunks and cut after each."""
    found = {case.name: quality_of(model, case, batches, _CHUNK) for case in cases}
    return {
        "chunk": _CHUNK,
        **{name: {metric: getattr(kept, metric), "peak_units": kept.peak} for name, kept in found.items()},
    }


def _by_case(model: Any, cases: Sequence[CacheCase], batches: Sequence[ContextRows], metric: str) -> dict[str, float]:
    return {case.name: getattr(quality_of(model, case, batches), metric) for case in cases}
