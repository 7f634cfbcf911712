"""What a Medusa adapter is measured against: plain decoding, untrained drafters, an assistant, and its own variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from checkpoints.load import read_tensors
from checkpoints.manifest import check_valid_for
from data.records import STDLIB, held_out_records, tokenize
from data.text import IGNORED, pack
from modules.decode_host.attach import attach_drafter
from modules.decode_host.counts import Counts
from modules.decode_host.search import expected_tokens
from modules.hybrid import Hybrid
from modules.language_models import load_model
from modules.medusa import MedusaConfig, MedusaHandle, OutputLayer, attach
from modules.medusa.drafter import DynamicMedusaDrafter
from modules.medusa.output_layer import last_hidden_state
from modules.prompt_lookup import PromptLookup
from modules.trie_lookahead import TrieLookahead
from trainers.evaluation import Measured, Request
from trainers.language_cases import LanguageCase, compiled_case, measure_language_cases
from trainers.medusa.prompts import prompts_for
from trainers.text_quality import repeated_share
from trainers.verdict import lossless_verdict

_PROMPT_LENGTH, _LOOKED_UP, _BLOCK = 256, 10, 256
_COMPILED = 3  # plain decoding, the adapter's tree and the hybrid
_DRAFTS = {"embedded:llama": "embedded:llama_draft"}


def measure(request: Request) -> Measured:
    """Speed, tokens per step and equality with plain decoding, by category of prompt.

    Raises:
        AdapterError: the adapter is not for this backbone.
    """
    manifest, tensors = request.manifest, read_tensors(request.adapter)
    settings, config = request.config.evaluation, MedusaConfig(**manifest.module)
    model, tokenizer = load_model(request.backbone, request.revision, request.config.dtype)
    model.to(request.device)
    check_valid_for(manifest, model)
    source = settings.prompts or STDLIB
    prompts = prompts_for("evaluation", source, tokenizer, settings.inputs, _PROMPT_LENGTH)
    load = partial(attach, model, manifest, tensors)
    cases = _cases(model, config, load, _draft_model(request))
    pad = int(tokenizer.pad_token_id)
    obstacle = None
    for case in cases[:_COMPILED] if settings.compiled else ():
        request.notify(f"compiling {case.name}")
        compiled, obstacle = compiled_case(model, case, prompts, settings.new_tokens, pad)
        if compiled is None:
            break
        cases.insert(cases.index(case) + 1, compiled)
    found = measure_language_cases(model, cases, prompts, settings=settings, pad=pad, notify=request.notify)
    plain = [found.texts[cases[0].name][i][len(prompt.ids) :] for i, prompt in enumerate(prompts)]
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    repeated = {
        name: repeated_share([t for t, prompt in zip(plain, prompts, strict=True) if prompt.category == name])
        for name in categories
    }
    own = next(row for row in found.rows if row.kind == "adapter")
    facts: dict[str, Any] = {
        "inputs": len(prompts),
        "prompts": source,
        "new_tokens": settings.new_tokens,
        "timing_batch": settings.timing_batch,
        "reference": "plain greedy decoding, token by token",
        "categories": found.categories,
        "repeated_trigrams": repeated,
        "tree_nodes": len(config.tree),
        "expected_tokens_per_step": expected_tokens(config.accuracy(), [tuple(choice) for choice in config.tree]),
        "measured_tokens_per_step": own.work["tokens_per_step"],
        "accuracy": config.accuracy(),
    }
    if obstacle is not None:
        facts["not_compiled"] = obstacle
    rows = found.rows
    if config.lora is not None:
        facts["reference"] = "plain greedy decoding, token by token; of Medusa by the backbone with its LoRA"
        plain_text, changed = _perplexities(model, load, source, tokenizer, settings.inputs)
        of_kind = {"baseline": plain_text, "adapter": changed}
        rows = [
            replace(row, quality=row.quality | {"perplexity": of_kind[row.kind]}) if row.kind in of_kind else row
            for row in rows
        ]
    return Measured(rows=rows, verdict=lossless_verdict(rows), facts=facts, plotted="tokens_per_step")


def _cases(model: Any, config: MedusaConfig, load: Callable[[], MedusaHandle], draft: Any) -> list[LanguageCase]:
    nodes, ranks = max(1, len(config.tree)), max(map(len, config.hits), default=1)

    counts = Counts()

    @contextmanager
    def medusa(change: Callable[[MedusaHandle], None] = lambda _: None) -> Iterator[dict[str, Any]]:
        nonlocal counts
        with load() as handle:
            change(handle)
            counts = handle.counts
            yield {}

    def calls() -> int:
        return counts.generations + counts.steps

    @contextmanager
    def drafted(make: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        # A new one each time: what it remembers of a prompt's last round would be the answer.
        with attach_drafter(model, make()):
            yield {}

    @contextmanager
    def called(**call: Any) -> Iterator[dict[str, Any]]:
        yield call

    def hybrid(handle: MedusaHandle) -> None:
        handle.draft_with(Hybrid(handle.medusa, PromptLookup(), nodes))

    def dynamic(handle: MedusaHandle) -> None:
        handle.draft_with(DynamicMedusaDrafter(handle.medusa.heads, nodes, ranks))

    # Medusa-2's text is the changed backbone's own: that is what it must equal.
    own = None if config.lora is None else partial(medusa, lambda handle: handle.medusa.use_tree([]))
    ours = partial(LanguageCase, kind="adapter", reference=own, calls=calls)
    cases = [
        LanguageCase(name="plain decoding", kind="baseline", enter=called, one_by_one=True),
        ours(name=f"Medusa, {nodes} nodes", enter=medusa),
        ours(name="Medusa and prompt lookup", enter=partial(medusa, hybrid)),
        ours(name="Medusa, dynamic tree", enter=partial(medusa, dynamic)),
        LanguageCase(name="prompt lookup", kind="untrained", enter=partial(drafted, PromptLookup)),
        LanguageCase(name="trie lookahead", kind="untrained", enter=partial(drafted, TrieLookahead)),
        LanguageCase(
            name="transformers' prompt lookup",
            kind="untrained",
            enter=partial(called, prompt_lookup_num_tokens=_LOOKED_UP),
        ),
    ]
    if draft is not None:
        cases.append(
            LanguageCase(name="transformers' assistant", kind="peer", enter=partial(called, assistant_model=draft))
        )
    return cases


def _draft_model(request: Request) -> Any:
    """The small model that is tried as an assistant: the one asked for, or the embedded backbone's own."""
    name = request.config.evaluation.assistant or _DRAFTS.get(request.backbone)
    if name is None:
        return None
    model, _ = load_model(name, None, request.config.dtype)
    return model.to(request.device)


@torch.no_grad()
def _perplexities(
    model: Any, load: Callable[[], MedusaHandle], source: str, tokenizer: Any, count: int
) -> tuple[float, float]:
    """Of held-out text, under the backbone and under the backbone that Medusa-2 changed."""
    documents = [tokenize(record, tokenizer) for record in held_out_records(source)[:count]]
    blocks = pack(documents, _BLOCK, int(tokenizer.pad_token_id)).select(slice(count))

    def perplexity() -> float:
        layer, nats, tokens = OutputLayer.of(model), 0.0, 0
        for row in range(len(blocks)):
            one = blocks.select(slice(row, row + 1)).to(model.device)
            hidden, targets = last_hidden_state(model, **one.model_inputs()), one.labels[0, 1:]
            logits = layer.logits(hidden[0, :-1]).float()
            nats += float(cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            tokens += int((targets != IGNORED).sum())
        return math.exp(nats / max(1, tokens))

    before = perplexity()
    with load():
        return before, perplexity()
