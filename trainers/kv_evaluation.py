"""What adapters of learned KV caches are measured by: the same contexts, bytes and clocks for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from checkpoints.load import local_folder, method_module, read_tensors
from checkpoints.manifest import Manifest, check_valid_for, read_manifest
from data.contexts import ContextRows
from modules.kv_host import KVHandle
from modules.language_models import load_model
from trainers.context_settings import NEEDLE
from trainers.contexts import held_out_rows
from trainers.evaluation import Measured, Request
from trainers.kv_cases import CacheCase, Reader, baseline_case, measure_cases, quality_of
from trainers.kv_rivals import HandleReader
from trainers.verdict import equal_memory_verdict

Load = Callable[[], Any]
"""Attaches an adapter to the model that is measured."""

CHUNK = 64  # of what shows chunked reading on short contexts
NEEDLE_CONTEXT = 512
_FEWEST = 32  # rows of long contexts
_STACKED = (1 / 8, 1 / 16, 1 / 32)  # of the full cache's bytes
_STACKED_WIDTH = "0.5"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Another way to read contexts than the rows', or other contexts.

    Attributes:
        length: of the contexts; None takes the rows'.
        chunk: tokens that are read at a time; None takes a context at once.
        style, decoys: of needles.
        fixed: budgets are those of the rows' contexts, whatever the length.
        measured: whether a case is; the baseline always is.
    """

    name: str
    length: int | None = None
    chunk: int | None = None
    style: str = "plain"
    decoys: int = 0
    fixed: bool = False
    measured: Callable[[CacheCase], bool] = lambda case: True


def _own(case: CacheCase) -> bool:
    return case.kind == "adapter"


_IN_CHUNKS = Reading(name="in chunks", chunk=CHUNK)
_SHIFTED = (
    Reading(name="shifted", style="shifted", measured=_own),
    Reading(name="shifted, twice as long", length=2 * NEEDLE_CONTEXT, style="shifted", measured=_own),
)


def measure_adapter(
    request: Request,
    own_cases: Callable[[Load, dict[str, torch.Tensor]], list[CacheCase]],
    rival_cases: Callable[[Any, dict[str, torch.Tensor]], list[CacheCase]],
    readings: Sequence[Reading] = (),
    needles: Mapping[str, Any] = MappingProxyType({}),
) -> Measured:
    """Quality of what follows a context, from what is kept of it, with bytes really held and time.

    Args:
        own_cases: given how to attach the adapter, and its tensors: its rows, the one that is judged first.
        rival_cases: given the model and the adapter's tensors.
        readings: of needles, beside those that every adapter has.
        needles: what all rows of needles are like, see `data.needle.Needles`.
    Raises:
        AdapterError: an adapter is not for this backbone.
    """
    settings = request.config.evaluation
    model, tokenizer = load_model(request.backbone, request.revision, request.config.dtype)
    model.to(request.device)
    load, tensors = _loader(model, request.manifest, request.adapter)
    source = settings.prompts or (NEEDLE if request.backbone == "embedded:needle" else "stdlib")
    context = NEEDLE_CONTEXT if source == NEEDLE else 3 * min(int(model.config.max_position_embeddings), 4096) // 4
    held_out = partial(held_out_rows, source, tokenizer, batch_size=settings.batch_size, seed=settings.seed, **needles)
    batches = held_out(context, settings.inputs)
    own = own_cases(load, tensors)
    stacked = _stacked(model, load, settings.beside) if settings.beside else []
    cases = [baseline_case(model), *own, *stacked, *rival_cases(model, tensors)]
    rows, decoding = measure_cases(model, cases, batches, settings=settings, notify=request.notify)
    metric = "accuracy" if source == NEEDLE else "perplexity"
    contexts = {}
    for reading in (_IN_CHUNKS, *((*_SHIFTED, *readings) if source == NEEDLE else ())):
        request.notify(f"reading {reading.name}")
        length = reading.length or context
        # As many tokens whatever the length, but no fewer rows than say something.
        count = max(min(settings.inputs, _FEWEST), settings.inputs * context // length)
        read = batches if reading is _IN_CHUNKS else held_out(length, count, style=reading.style, decoys=reading.decoys)
        contexts[reading.name] = _by_case(model, cases, read, reading, metric, context)
    facts: dict[str, Any] = {
        "inputs": sum(map(len, batches)),
        "context": context,
        "timing_batch": 1,
        "timing_context": settings.timing_contexts[0],
        "reference": "the backbone with its full cache",
        "contexts": contexts,
        "decoding": decoding,
    }
    verdict = equal_memory_verdict(rows, metric)
    return Measured(rows=rows, verdict=verdict, facts=facts, plotted=metric, against="cache_bytes")


def _loader(model: Any, manifest: Manifest, folder: Path) -> tuple[Load, dict[str, torch.Tensor]]:
    """How to attach an adapter again and again, without reading or checking it each time."""
    check_valid_for(manifest, model)
    tensors = read_tensors(folder)
    return partial(method_module(manifest.method).attach, model, manifest, tensors), tensors


def _stacked(model: Any, load: Load, beside: str) -> list[CacheCase]:
    folder = local_folder(beside, None)
    other, _ = _loader(model, read_manifest(folder), folder)
    return [
        CacheCase(
            name=f"both, {share:.4g} of the bytes",
            kind="adapter",
            enter=partial(_both, load, other, share),
            group="both",
            share=share,
        )
        for share in _STACKED
    ]


@contextmanager
def _both(one: Load, other: Load, share: float, context: int) -> Iterator[Reader]:
    """Both adapters at work: as many units as a share of the full bytes holds, half as wide and with scores."""
    with ExitStack() as stack:
        handles: list[KVHandle] = [stack.enter_context(load()) for load in (one, other)]
        for handle in handles:
            if hasattr(handle, "use_budget"):
                handle.use_budget(_STACKED_WIDTH)
        host = handles[-1].host
        full, unit = host.unit_bytes(stored=False), host.unit_bytes()
        handles[-1].use(budget=max(1, int(share * context * full / unit)), stabilizers=0, local=0, query_first=False)
        yield HandleReader(handles[-1])


def _by_case(
    model: Any, cases: Sequence[CacheCase], batches: Sequence[ContextRows], reading: Reading, metric: str, context: int
) -> dict[str, Any]:
    """How the contexts were read, and by case the metric and the most units that a layer held."""
    budget_of = context if reading.fixed else None
    found = {
        case.name: quality_of(model, case, batches, reading.chunk, budget_of)
        for case in cases
        if case is cases[0] or reading.measured(case)
    }
    return {
        "length": batches[0].context,
        "inputs": sum(map(len, batches)),
        "chunk": reading.chunk,
        "decoys": reading.decoys,
        "metric": metric,
        "cases": {name: {metric: getattr(kept, metric), "peak_units": kept.peak} for name, kept in found.items()},
    }
