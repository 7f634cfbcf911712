"""What heads are taught: how strongly an answer looks at each token of its prompt, from one pass of the backbone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from modules.kv_host import AttentionSite, CachePolicy, HeldUnits, NewTokens, attach_cache
from modules.kv_host.interface import Probe, probing
from modules.kv_host.roles import FeatureTap
from modules.locret.heads import LocretSelector, RetainingHeads

_BLOCK = 2**24
"""Logits that exist at a time."""


def causal_importance(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Largest logit that any of the queries gives each key, over the query heads of its group.

    Logits are those before the softmax, after rotation, times `scaling`.

    Args:
        queries: [B, H g, n_a, d], the answer's.
        keys: [B, H, n, d], the prompt's.
    Returns:
        [B, H, n] in float32.
    Source: Huang et al. 2024, section 3.2, with the scale of the published code.
    """
    batch, heads, count, size = keys.shape
    packed = queries.reshape(batch, heads, -1, size)
    rows = max(1, _BLOCK // max(1, batch * heads * count))
    best = torch.full((batch, heads, count), -torch.inf, device=keys.device)
    for part in torch.split(packed, rows, dim=2):
        best = torch.maximum(best, (part @ keys.transpose(2, 3)).float().amax(2) * scaling)
    return best


@torch.no_grad()
def features_and_labels(
    model: Any,
    sites: Sequence[AttentionSite],
    input_ids: Tensor,
    prompt: int,
    question: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What a head reads and what it is to say, of every layer, from one pass without gradients.

    Args:
        input_ids: [B, n + n_a], a prompt of n tokens and its answer.
        prompt: n.
        question: [B, l], read before everything else at places before 0 (the query-aware variant); not labelled.
    Returns:
        by layer, features [B, n, F] and labels [B, n, H].
    """
    if not 0 < prompt < input_ids.shape[1]:
        raise ValueError(f"the prompt has {prompt} of {input_ids.shape[1]} tokens: both it and the answer need some")
    first = 0 if question is None else question.shape[1]
    labels: dict[int, Tensor] = {}

    def probe(site: AttentionSite) -> Probe:
        scaling = float(getattr(site.module, "scaling", site.head_dim**-0.5))

        def look(query: Tensor, key: Tensor, value: Tensor) -> None:
            answer = query[:, :, first + prompt :]
            labels[site.index] = causal_importance(answer, key[:, :, first : first + prompt], scaling).transpose(1, 2)

        return look

    place = torch.arange(-first, input_ids.shape[1], device=input_ids.device)
    ids = input_ids if question is None else torch.cat([question, input_ids], dim=1)
    with ExitStack() as stack:
        taps = [stack.enter_context(FeatureTap(site).listening()) for site in sites]
        stack.enter_context(probing(model, {site.module: probe(site) for site in sites}))
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=place.expand(len(ids), -1),
            use_cache=False,
            logits_to_keep=1,
        )
        features = [tap.take()[:, first : first + prompt] for tap in taps]
    return [(feature, labels[site.index]) for site, feature in zip(sites, features, strict=True)]


class _Recorder(LocretSelector):
    """Heads at work that keep what they read."""

    def __init__(self, heads: RetainingHeads) -> None:
        super().__init__(heads)
        self.read: dict[int, list[Tensor]] = defaultdict(list)

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        self.read[new.layer].append(cast(Tensor, new.features))
        return super().score(new, held)


@torch.no_grad()
def features_while_evicting(model: Any, heads: RetainingHeads, policy: CachePolicy, prompts: Tensor) -> list[Tensor]:
    """Features of prompts [B, n] as the heads find them in use: read in chunks, behind what they have kept so far.

    Args:
        policy: its budget, chunk, stabilizers and positions count; a prompt's last tokens are read like all others.
    Returns:
        by layer, [B, n, F].
    """
    recorder = _Recorder(heads)
    with attach_cache(model, selector=recorder, policy=replace(policy, local=0, query_first=False)) as handle:
        handle.prefill(prompts)
    return [torch.cat(recorder.read[layer], dim=1) for layer in sorted(recorder.read)]
