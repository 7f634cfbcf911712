"""What a head is asked for: the tokens after the next one, within one document, where the backbone's voice speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from data.text import IGNORED, Blocks
from modules.medusa.heads import MedusaHeads
from modules.medusa.output_layer import OutputLayer

Kind = Literal["ce", "kl", "lk"]
Rows = Callable[[Tensor, "Tensor | None", Tensor], Tensor]
"""(logits [n, V'], the backbone's logits for the same tokens [n, V'] or None, targets [n]) -> summed loss."""


def valid_targets(blocks: Blocks, ahead: int) -> Tensor:
    """[N, L - ahead]: whether token t + ahead is a target for position t: to be learned, and of the same document."""
    segments = blocks.segments()
    same = segments[:, ahead:] == segments[:, : segments.shape[1] - ahead]
    return same & (blocks.labels[:, ahead:] != IGNORED)


def needed_states(blocks: Blocks, heads: int) -> Tensor:
    """[N, L]: whose states so many heads, or their teacher, ever look at."""
    needed = torch.zeros_like(blocks.labels, dtype=torch.bool)
    for ahead in range(2, heads + 2):
        valid = valid_targets(blocks, ahead)
        needed[:, : valid.shape[1]] |= valid
        needed[:, ahead - 1 : ahead - 1 + valid.shape[1]] |= valid
    return needed


@dataclass(frozen=True)
class HeadLoss:
    """Loss of one head: its mean over valid targets, and the shares of these that its first guess hits."""

    loss: Tensor
    accuracy: Tensor


def head_weights(count: int, decay: float) -> list[float]:
    """lambda_k = decay^k for k = 1 .. count."""
    return [decay ** (k + 1) for k in range(count)]


def head_losses(
    heads: MedusaHeads,
    features_NLF: Tensor,
    blocks: Blocks,
    backbone: OutputLayer,
    *,
    kind: Kind,
    eta: float,
    rows: int,
    draw: Callable[[int], Tensor] | None = None,
) -> list[HeadLoss]:
    """The loss of every head over packed blocks, normalised by its own count of valid targets.

    Position t of head k (from 0) is compared with token t + 2 + k.

    Args:
        features_NLF: the backbone's last hidden states, detached, and beside them the outputs of layers that the heads
            read; also the teacher's: softmax of its logits at t + 1 + k, which no further forward has to produce.
        rows: positions whose logits exist at a time.
        draw: which of so many positions count, int64 [n]; None for all.
    """
    valid, found, states = _valid_by_head(blocks, heads.config.num_heads), [], None
    n, t = valid.any(0).nonzero(as_tuple=True)
    if draw is not None:
        drawn = draw(len(n)).to(n.device)
        n, t = n[drawn], t[drawn]
    hidden, path = heads.enter(features_NLF[n, t]), path_after(blocks, n, t, heads.config.num_heads)
    last_NLD = features_NLF[..., : heads.config.hidden_size].detach()
    for head in range(heads.config.num_heads):
        states = heads.states(hidden, backbone, head, path, states)
        mine = valid[head, n, t]
        place = n[mine], t[mine] + head + 2
        wanted = _Wanted(blocks.labels[place], last_NLD[place[0], place[1] - 1] if kind != "ce" else None)
        found.append(_head_loss(heads, head, states[mine], wanted, backbone, _SCORES[kind](eta), rows))
    return found


def _valid_by_head(blocks: Blocks, count: int) -> Tensor:
    """[K, N, L]: `valid_targets` of every head, nothing being valid where a block has ended."""
    length = blocks.labels.shape[1]
    each = [valid_targets(blocks, head + 2) for head in range(count)]
    return torch.stack([functional.pad(valid, (0, length - valid.shape[1])) for valid in each])


@dataclass(frozen=True)
class _Wanted:
    """What one head is compared with: tokens [n], and the states [n, D] that the backbone said them from, or None."""

    tokens: Tensor
    teacher: Tensor | None


def _head_loss(
    heads: MedusaHeads,
    head: int,
    states: Tensor,
    wanted: _Wanted,
    backbone: OutputLayer,
    score: Rows,
    rows: int,
) -> HeadLoss:
    targets, teacher, valid = wanted.tokens, wanted.teacher, len(wanted.tokens)
    if heads.token_ids is not None:  # targets that a pruned head cannot name teach it nothing, and are misses
        targets = _number_among(heads.token_ids, heads.config.vocab_size)[targets]
        named = targets >= 0
        states, targets = states[named], targets[named]
        teacher = None if teacher is None else teacher[named]

    teach = None if teacher is None else backbone.logits_among(heads.token_ids)

    def reduce(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        logits, theirs = logits.float(), None
        if teacher is not None and teach is not None:
            with torch.no_grad():
                theirs = teach(teacher[part]).float()
        hits = (logits.detach().argmax(-1) == targets[part]).sum()
        return score(logits, theirs, targets[part]), hits

    total, hits = cast("tuple[Tensor, Tensor]", heads.guesses(states, backbone, head, reduce, rows))
    return HeadLoss(total / max(1, len(targets)), hits / max(1, valid))


def path_after(blocks: Blocks, n: Tensor, t: Tensor, count: int) -> Tensor:
    """The `count` tokens [.., count] after the positions t of the blocks n; past a block's end its last token again."""
    places = t[:, None] + torch.arange(1, count + 1, device=t.device)
    return blocks.input_ids[n[:, None], places.clamp(max=blocks.input_ids.shape[1] - 1)]


def _number_among(token_ids: Tensor, vocabulary: int) -> Tensor:
    """[V]: which of the head's tokens a token is, or -1."""
    number = torch.full((vocabulary,), -1, device=token_ids.device)
    number[token_ids] = torch.arange(len(token_ids), device=token_ids.device)
    return number


def _cross_entropy(logits: Tensor, wanted: Tensor | None, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="sum")


def _divergence(logits: Tensor, wanted: Tensor | None, targets: Tensor) -> Tensor:
    return _row_divergence(logits, cast(Tensor, wanted)).sum()


def _row_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    ours, theirs = functional.log_softmax(logits, -1), functional.log_softmax(wanted, -1)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def _likelihood_of_acceptance(eta: float) -> Rows:
    """KL while little is accepted, total variation (one minus the accepted share) where much is."""

    def score(logits: Tensor, wanted: Tensor | None, targets: Tensor) -> Tensor:
        theirs = cast(Tensor, wanted)
        accepted = torch.minimum(functional.softmax(logits, -1), functional.softmax(theirs, -1)).sum(-1)
        weight = torch.exp(-eta * accepted.detach())
        return (weight * _row_divergence(logits, theirs) + (1 - weight) * (1 - accepted)).sum()

    return score


_SCORES: dict[Kind, Callable[[float], Rows]] = {
    "ce": lambda eta: _cross_entropy,
    "kl": lambda eta: _divergence,
    "lk": _likelihood_of_acceptance,
}
