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


@dataclass(frozen=True)
class HeadLoss:
    """Loss of one head: its mean over valid targets, and the shares of these that its first guess hits."""

    loss: Tensor
    accuracy: Tensor


def head_weights(count: int, decay: float) -> list[float]:
    """lambda_k = decay^k for k = 1 .. count."""
    return [decay ** (k + 1) for k in range(count)]


def head_loss(
    heads: MedusaHeads,
    head: int,
    hidden_NLD: Tensor,
    blocks: Blocks,
    backbone: OutputLayer,
    *,
    kind: Kind,
    eta: float,
    rows: int,
) -> HeadLoss:
    """The loss of one head over packed blocks, normalised by its own count of valid targets.

    Args:
        head: from 0; position t is compared with token t + 2 + head.
        hidden_NLD: the backbone's last hidden states, detached; also the teacher's: softmax of its logits at t + 1 +
            head, which no further forward has to produce.
        rows: positions whose logits exist at a time.
    """
    ahead = head + 2
    n, t = valid_targets(blocks, ahead).nonzero(as_tuple=True)
    targets, valid = blocks.labels[n, t + ahead], len(n)
    if heads.token_ids is not None:  # targets that a pruned head cannot name teach it nothing, and are misses
        targets = _number_among(heads.token_ids, heads.config.vocab_size)[targets]
        n, t, targets = (values[targets >= 0] for values in (n, t, targets))
    teacher = hidden_NLD[n, t + ahead - 1].detach() if kind != "ce" else None
    score = _SCORES[kind](eta)

    def reduce(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        logits, wanted = logits.float(), None
        if teacher is not None:
            with torch.no_grad():
                wanted = backbone.logits(teacher[part]).float()
                wanted = wanted if heads.token_ids is None else wanted[:, heads.token_ids]
        hits = (logits.detach().argmax(-1) == targets[part]).sum()
        return score(logits, wanted, targets[part]), hits

    path = path_after(blocks, n, t, heads.config.tokens_read(head))
    total, hits = cast("tuple[Tensor, Tensor]", heads(hidden_NLD[n, t], backbone, head, reduce, rows, path))
    return HeadLoss(total / max(1, len(n)), hits / max(1, valid))


def path_after(blocks: Blocks, n: Tensor, t: Tensor, count: int) -> Tensor:
    """The `count` tokens [.., count] after the positions t of the blocks n."""
    return blocks.input_ids[n[:, None], t[:, None] + torch.arange(1, count + 1, device=t.device)]


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
