"""Measures ways to decode against one another: tokens per step, time by category of prompt, equality of the text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import torch

from trainers.config import Evaluation
from trainers.rows import Kind, Row
from trainers.timing import Timing, alternate, peak_memory

Ids = tuple[int, ...]


class Prompt(Protocol):
    """Token ids, and the kind of text that they begin."""

    @property
    def ids(self) -> Ids:
        """At least one."""

    @property
    def category(self) -> str:
        """What the report's tables are split by."""


@dataclass(frozen=True, kw_only=True)
class LanguageCase:
    """One way to decode.

    Attributes:
        enter: sets the shared model up, yields further arguments of `generate`, and undoes it on leaving.  It is
            entered once per timed call, outside the clock.
        reference: as enter, the decoding whose text this one must equal; None is the baseline's.
        one_by_one: known to call the backbone once a token.
        calls: how often the backbone was called since `enter`.  Where neither says, a hook counts, which a compiled
            step would take in.
    """

    name: str
    kind: Kind
    enter: Callable[[], AbstractContextManager[dict[str, Any]]]
    reference: Callable[[], AbstractContextManager[dict[str, Any]]] | None = None
    one_by_one: bool = False
    calls: Callable[[], int] | None = None


@dataclass(frozen=True, kw_only=True)
class LanguageMeasurement:
    """What was found.

    Attributes:
        rows: one for each case, over all categories.
        categories: by category and case the figures of that category alone.
        texts: by case, prompt and output of every prompt.
    """

    rows: list[Row]
    categories: dict[str, dict[str, dict[str, float]]]
    texts: dict[str, list[Ids]] = field(repr=False)


def measure_language_cases(
    model: Any,
    cases: Sequence[LanguageCase],
    prompts: Sequence[Prompt],
    *,
    settings: Evaluation,
    pad: int,
    notify: Callable[[str], None] = lambda _: None,
) -> LanguageMeasurement:
    """Greedy decoding, one prompt at a time, of every case.

    Text and tokens per step are of all prompts; time is of the first `timing_batch` of each category, the cases
    alternating (`trainers.timing.alternate`).

    Args:
        cases: the first one is the baseline.
        settings: `new_tokens`, `timing_batch`, `repeats` and `seed` are used.
    """
    device, baseline = model.device, cases[0].name
    run = _Decoder(model, settings.new_tokens, pad)
    texts: dict[str, list[Ids]] = {}
    calls: dict[str, list[int]] = {}
    for number, case in enumerate(cases, 1):
        notify(f"text of {case.name} ({number}/{len(cases)})")
        with case.enter() as call:
            texts[case.name], calls[case.name] = run.counted(prompts, call, case)
    same = {case.name: _equal(case, texts, run, prompts, baseline) for case in cases}
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(index)
    timings: dict[str, dict[str, Timing]] = {}
    for name, members in groups.items():
        notify(f"timing {len(cases)} cases in turns on {name}, {settings.repeats} rounds")
        timed = [prompts[index] for index in members[: settings.timing_batch]]
        prepared = {case.name: _timed(case, run, timed) for case in cases}
        # Every case has just decoded every prompt, which is warm-up enough.
        timings[name] = alternate(
            prepared, baseline, device=device, rounds=settings.repeats, warmup=0, seed=settings.seed
        )
    memory = {case.name: _memory(case, run, prompts[:1], device) for case in cases}

    def figures(case: LanguageCase, members: Sequence[int], timing: Timing, timed: Sequence[int]) -> dict[str, float]:
        own, steps = texts[case.name], calls[case.name]
        new = [len(own[i]) - len(prompts[i].ids) for i in members]
        per_step = sum(n - 1 for n in new) / max(1, sum(steps[i] - 1 for i in members))
        produced = sum(len(own[i]) - len(prompts[i].ids) for i in timed)
        return {
            "tokens_per_step": per_step,
            "overhead": per_step / timing.speedup,
            "tokens_per_s": produced / timing.latency_s,
            "speedup": timing.speedup,
            "exact_match": statistics.mean(same[case.name][i] for i in members),
        }

    timed_of = {name: members[: settings.timing_batch] for name, members in groups.items()}
    categories = {
        name: {case.name: figures(case, members, timings[name][case.name], timed_of[name]) for case in cases}
        for name, members in groups.items()
    }
    rows, everything = [], [index for members in timed_of.values() for index in members]
    for case in cases:
        timing = _together(timings, case.name, baseline)
        found = figures(case, range(len(prompts)), timing, everything)
        rows.append(
            Row(
                name=case.name,
                kind=case.kind,
                speedup=timing.speedup,
                speedup_range=timing.speedup_range,
                latency_s=timing.latency_s,
                work={name: found[name] for name in ("tokens_per_step", "overhead", "tokens_per_s")},
                memory_bytes=memory[case.name],
                quality={"exact_match": found["exact_match"]},
            )
        )
    return LanguageMeasurement(rows=rows, categories=categories, texts=texts)


def compiled_case(
    model: Any, case: LanguageCase, prompts: Sequence[Prompt], new_tokens: int, pad: int
) -> tuple[LanguageCase | None, str | None]:
    """A case with a static cache and a compiled step; or None and why this does not compile here."""
    from transformers import CompileConfig

    compiling = CompileConfig(mode="default" if model.device.type == "cpu" else "reduce-overhead", fullgraph=False)
    compiling._compile_all_devices = True

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with case.enter() as call:
            yield {**call, "cache_implementation": "static", "compile_config": compiling}

    try:
        with enter() as call:
            for prompt in prompts[:2]:  # the second length makes the lengths dynamic
                _Decoder(model, new_tokens, pad)(prompt, call)
    except Exception as error:  # the compiler's own classes, and whatever a model's code meets in it
        return None, " ".join(str(error).split())[:200]
    kind: Kind = "plain" if case.kind == "baseline" else case.kind
    return replace(case, name=f"{case.name}, compiled", kind=kind, enter=enter), None


class _Decoder:
    """Greedy decoding of prompts, one at a time."""

    def __init__(self, model: Any, new_tokens: int, pad: int) -> None:
        self.model, self.new_tokens, self.pad = model, new_tokens, pad

    def __call__(self, prompt: Prompt, call: Mapping[str, Any]) -> Ids:
        ids = torch.tensor([prompt.ids], device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=self.pad,
            **call,
        )
        return tuple(output[0].tolist())

    def counted(
        self, prompts: Sequence[Prompt], call: Mapping[str, Any], case: LanguageCase
    ) -> tuple[list[Ids], list[int]]:
        """Texts, and how often the backbone was called for each, the prompt's own call included."""
        if case.one_by_one:
            texts = [self(prompt, call) for prompt in prompts]
            return texts, [len(text) - len(prompt.ids) for text, prompt in zip(texts, prompts, strict=True)]
        if case.calls is not None:
            texts, calls = [], [case.calls()]
            for prompt in prompts:
                texts.append(self(prompt, call))
                calls.append(case.calls())
            return texts, [after - before for before, after in pairwise(calls)]
        calls = [0]

        def count(*_: Any) -> None:
            calls[-1] += 1

        hook = self.model.base_model.register_forward_pre_hook(count)
        texts = []
        try:
            for prompt in prompts:
                texts.append(self(prompt, call))
                calls.append(0)
        finally:
            hook.remove()
        return texts, calls[:-1]


def _equal(
    case: LanguageCase, texts: Mapping[str, list[Ids]], run: _Decoder, prompts: Sequence[Prompt], baseline: str
) -> list[bool]:
    """Of every prompt, whether the text is the reference's."""
    wanted = texts[baseline]
    if case.reference is not None:
        with case.reference() as call:
            wanted = [run(prompt, call) for prompt in prompts]
    return [ours == theirs for ours, theirs in zip(texts[case.name], wanted, strict=True)]


def _timed(
    case: LanguageCase, run: _Decoder, prompts: Sequence[Prompt]
) -> Callable[[], AbstractContextManager[Callable[[], object]]]:
    @contextmanager
    def prepare() -> Iterator[Callable[[], object]]:
        with case.enter() as call:
            yield lambda: [run(prompt, call) for prompt in prompts]

    return prepare


def _memory(case: LanguageCase, run: _Decoder, prompts: Sequence[Prompt], device: torch.device) -> int:
    with _timed(case, run, prompts)() as call:
        return peak_memory(call, device)


def _together(timings: Mapping[str, Mapping[str, Timing]], name: str, baseline: str) -> Timing:
    """All categories as if each round had been one call."""
    own = [sum(seconds) for seconds in zip(*(group[name].seconds for group in timings.values()), strict=True)]
    plain = [sum(seconds) for seconds in zip(*(group[baseline].seconds for group in timings.values()), strict=True)]
    ratios = [theirs / ours for theirs, ours in zip(plain, own, strict=True)]
    return Timing(statistics.median(own), statistics.median(ratios), (min(ratios), max(ratios)), tuple(own))
