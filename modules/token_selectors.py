"""The untrained members of the family that chooses cache units: windows, norms, differences, attention of the past."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modules.contracts import TokenSelector
from modules.kv_host.layer import HeldUnits, NewTokens
from modules.kv_host.roles import AttentionSite, attention_sites, rotary_frequencies, rotate
from modules.kv_host.units import NOT_TEXT


class SinkAndWindow(TokenSelector):
    """The first tokens of a text and its last ones.

    Source: Xiao et al. 2023, arXiv:2309.17453 (StreamingLLM).
    """

    def __init__(self, sinks: int = 4) -> None:
        self.sinks = sinks

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`: the place in the text, and more than any place for sinks."""
        places = new.positions.float()
        scores = places.masked_fill((new.positions >= 0) & (new.positions < self.sinks), 1e9)
        return scores[:, None].expand(new.keys.shape[:3]).contiguous()


class KeyNorm(TokenSelector):
    """Keys of small norm, which attention tends to look at.

    Source: Devoto et al. 2024, arXiv:2406.11430.
    """

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        norms: Tensor = torch.linalg.vector_norm(new.keys.float(), dim=-1)
        return -norms


class Random(TokenSelector):
    """Any units: what a selector has to be better than."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        generator = new.memory.setdefault("generator", torch.Generator().manual_seed(self.seed + new.layer))
        return torch.rand(new.keys.shape[:3], generator=generator).to(new.keys.device)


class KeyDifference(TokenSelector):
    """Keys that are unlike the average direction of all held keys.

    Source: Park et al. 2025, arXiv:2504.15364 (KeyDiff).
    """

    causal = False

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        assert held is not None
        direction = functional.normalize(held.keys.float(), dim=-1)
        text = _text(held, direction)
        middle = (direction * text[..., None]).sum(2, keepdim=True) / text.sum(2)[..., None, None].clamp(min=1)
        return -functional.cosine_similarity(held.keys.float(), middle, dim=-1)


class SnapKV(TokenSelector):
    """What the last queries attend to, smoothed over neighbours; those last tokens stay too.

    Source: Li et al. 2024, arXiv:2404.14469.
    """

    causal = False

    def __init__(self, window: int = 32, kernel: int = 5) -> None:
        self.window, self.kernel = window, kernel

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        assert held is not None
        batch, heads, count, size = held.keys.shape
        tokens = new.queries.shape[2]
        text = torch.ones(batch, tokens, dtype=torch.bool) if new.valid is None else new.valid
        ends = text.to(held.keys.device).sum(1)  # filling comes after a sequence's text in a chunk
        width = min(self.window, tokens)
        row = ends[:, None] - width + torch.arange(width, device=held.keys.device)
        counted, row = (row >= 0)[:, None, None, :, None], row.clamp(min=0)
        index = row[:, None, :, None].expand(-1, new.queries.shape[1], -1, size)
        queries = new.queries.gather(2, index).view(batch, heads, -1, width, size)
        logits = (queries @ held.keys[:, :, None].transpose(-1, -2)).float() / math.sqrt(size)
        column = torch.arange(count, device=held.keys.device)
        seen = column <= (row + count - tokens)[..., None]  # [B, w, N]
        logits = logits.masked_fill(~(seen[:, None, None] & _text(held, logits)[:, :, None, None].bool()), -torch.inf)
        weight = logits.softmax(-1).nan_to_num().masked_fill(~counted, 0.0).sum(3) / counted.sum(3).clamp(min=1)
        weight = weight.mean(2)
        pooled = functional.avg_pool1d(weight, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)
        own = (column >= row.min(1).values[:, None] + count - tokens) & (column < ends[:, None] + count - tokens)
        return pooled.masked_fill(own[:, None], torch.inf)


class ExpectedAttention(TokenSelector):
    """Attention that a query like those of the text so far would pay, from anywhere in the next tokens.

    Queries from before their rotation are taken as normally distributed; mean and covariance are rotated by the average
    rotation of the next `ahead` places; the score is the softmax of the expected exponential times the value's norm.

    Source: kvpress (NVIDIA 2025), ExpectedAttentionPress; Devoto et al. 2025, arXiv:2510.00636.
    Departs from it: statistics are of all text so far where it is read in chunks.
    """

    causal = False
    needs_features = needs_positions = True

    def __init__(self, model: Any, ahead: int = 512, sinks: int = 4) -> None:
        self.frequencies, self.ahead, self.sinks = rotary_frequencies(model), ahead, sinks
        self._sites = attention_sites(model)
        self._norms = [getattr(site.module, "q_norm", None) for site in self._sites]

    def check(self, sites: Sequence[AttentionSite]) -> None:
        """See `TokenSelector`."""
        if [site.module for site in sites] != [site.module for site in self._sites]:
            raise ValueError("this expected attention was made for another model")

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        assert held is not None and new.features is not None
        batch, heads, _, size = held.keys.shape
        mean, covariance, last = self._statistics(new, size)
        turn = self._average_rotation(size, last)  # [B, d, d]
        mean = torch.einsum("bij,bhj->bhi", turn, mean)
        covariance = torch.einsum("bij,bhjk,blk->bhil", turn, covariance, turn)
        keys = held.keys.float().repeat_interleave(mean.shape[1] // heads, dim=1)
        logits = torch.einsum("bhnd,bhd->bhn", keys, mean) / math.sqrt(size)
        logits = logits + torch.einsum("bhni,bhij,bhnj->bhn", keys, covariance, keys) / size / 2
        text = _text(held, logits).repeat_interleave(mean.shape[1] // heads, dim=1)
        weight = logits.masked_fill(text == 0, -torch.inf).softmax(-1).view(batch, heads, -1, keys.shape[2]).mean(2)
        scores: Tensor = weight * torch.linalg.vector_norm(held.values.float(), dim=-1)
        assert held.positions is not None
        first = (held.positions >= 0) & (held.positions < self.sinks)
        return scores.masked_fill(first, torch.inf)

    def _statistics(self, new: NewTokens, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, H_q, d] and covariance [B, H_q, d, d] of the queries so far, and the last place [B]."""
        assert new.features is not None
        heads = new.queries.shape[1]
        queries = new.features[..., : heads * size].reshape(*new.features.shape[:2], heads, size)
        norm = self._norms[new.layer]
        queries = (queries if norm is None else norm(queries)).float()
        text = torch.ones_like(queries[..., :1]) if new.valid is None else new.valid[..., None, None].float()
        queries = queries * text
        memory = new.memory
        memory["count"] = memory.get("count", 0) + text.sum(1)
        memory["sum"] = memory.get("sum", 0) + queries.sum(1)
        memory["square"] = memory.get("square", 0) + torch.einsum("bthi,bthj->bhij", queries, queries)
        places = new.positions if new.valid is None else new.positions.where(new.valid, NOT_TEXT)
        memory["last"] = torch.maximum(memory.get("last", places.amax(1)), places.amax(1))
        count = memory["count"].clamp(min=1)
        mean = memory["sum"] / count
        covariance = memory["square"] / count[..., None] - mean[..., None] * mean[..., None, :]
        return mean, covariance, memory["last"]

    def _average_rotation(self, size: int, last: Tensor) -> Tensor:
        """[B, d, d], which turns a query as the average of the next places would."""
        ahead = last[:, None] + 1 + torch.arange(self.ahead, device=last.device)
        unit = torch.eye(size, device=last.device).expand(len(last), self.ahead, -1, -1)
        turned = rotate(unit, ahead[..., None].expand(-1, -1, size), self.frequencies.to(last.device))
        return turned.mean(1).transpose(-1, -2)


def _text(held: HeldUnits, like: Tensor) -> Tensor:
    """1 where a unit is text, [B, H, N]."""
    if held.positions is None:
        return torch.ones(held.keys.shape[:3], device=like.device)
    return (held.positions != NOT_TEXT).float()
