"""The heads' loss: which targets count, what it is worth by hand, and that chunks and padding change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.text import IGNORED, Blocks
from modules.medusa.config import READS, MedusaConfig
from modules.medusa.heads import MedusaHeads
from modules.medusa.output_layer import OutputLayer
from trainers.medusa.objective import head_losses, head_weights, valid_targets

V, D, K = 11, 6, 2


@pytest.fixture
def layer() -> OutputLayer:
    torch.manual_seed(3)
    return OutputLayer(nn.Linear(D, V, bias=False).requires_grad_(False))


def noisy_heads(layer: OutputLayer, **changes: Any) -> MedusaHeads:
    config = MedusaConfig(**{"hidden_size": D, "vocab_size": V, "num_heads": K, "vocabulary": "own", **changes})
    drafted = None if config.draft_vocab_size is None else torch.arange(1, 1 + config.draft_vocab_size)
    heads = MedusaHeads(config).start_from(layer, drafted)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    return heads


def packed(rows: list[list[list[int]]], unspoken: dict[tuple[int, int], None] | None = None) -> Blocks:
    """Blocks of rows of documents; a document's first token and the named (row, place) are not to be learned."""
    ids = torch.tensor([[token for document in row for token in document] for row in rows])
    positions = torch.tensor([[place for document in row for place in range(len(document))] for row in rows])
    labels = ids.where(positions != 0, IGNORED)
    for row, place in unspoken or {}:
        labels[row, place] = IGNORED
    return Blocks(ids, positions, labels)


def by_hand(
    heads: MedusaHeads,
    head: int,
    hidden: Tensor,
    layer: OutputLayer,
    pairs: list[tuple[int, int, int]],
    blocks: Blocks | None = None,
) -> Tensor:
    """Mean cross entropy over (row, position, target), heads reading the tokens of `blocks` from position + 1 on."""
    losses = []
    for row, t, target in pairs:
        path = None if blocks is None else blocks.input_ids[row, t + 1 : t + 2 + head][None]
        logits = heads(hidden[row, t][None], layer, head, path=path)
        losses.append(functional.cross_entropy(logits, torch.tensor([target])))
    return torch.stack(losses).mean()


def loss_of(heads: MedusaHeads, head: int, hidden: Tensor, blocks: Blocks, layer: OutputLayer, **changes: Any) -> Any:
    return head_losses(heads, hidden, blocks, layer, **{"kind": "ce", "eta": 3.0, "rows": 1000, **changes})[head]


@pytest.mark.parametrize("reads", READS)
def test_targets_stay_in_their_document_and_in_what_is_spoken(layer: OutputLayer, reads: str) -> None:
    """Heads that read the path have gone over every token before; which positions count is each head's own."""
    blocks = packed([[[1, 2, 3, 4, 5], [6, 7, 8]], [[9, 10, 1], [2, 3, 4, 5, 6]]], {(0, 3): None})
    heads, hidden = noisy_heads(layer, reads=reads), torch.randn(2, 8, D)
    # (row, position, target): token t + 2 for the first head, t + 3 for the second; token 4 of row 0 is not spoken.
    first = [(0, 0, 3), (0, 2, 5), (0, 5, 8), (1, 0, 1), (1, 3, 4), (1, 4, 5), (1, 5, 6)]
    second = [(0, 1, 5), (1, 3, 5), (1, 4, 6)]
    for head, pairs in enumerate((first, second)):
        got = loss_of(heads, head, hidden, blocks, layer)
        torch.testing.assert_close(got.loss, by_hand(heads, head, hidden, layer, pairs, blocks))
        path = [blocks.input_ids[row, t + 1 : t + 2 + head] for row, t, _ in pairs]
        guesses = [
            heads(hidden[row, t], layer, head, path=tokens).argmax() == target
            for (row, t, target), tokens in zip(pairs, path, strict=True)
        ]
        assert got.accuracy.item() == pytest.approx(sum(map(bool, guesses)) / len(pairs))
        assert valid_targets(blocks, head + 2).sum() == len(pairs)


def test_weights_fall_by_the_heads_distance() -> None:
    assert head_weights(3, 0.8) == pytest.approx([0.8, 0.64, 0.512])


@pytest.mark.parametrize("kind", ["ce", "kl", "lk"])
@pytest.mark.parametrize("vocabulary", ["own", "tied", "pruned"])
def test_chunks_change_neither_loss_nor_gradient(layer: OutputLayer, kind: str, vocabulary: str) -> None:
    torch.manual_seed(0)
    size = {"draft_vocab_size": 6} if vocabulary == "pruned" else {}
    heads = noisy_heads(layer, vocabulary=vocabulary, **size)
    blocks = packed([[torch.randint(0, V, (40,)).tolist()]])
    hidden = torch.randn(1, 40, D)
    found = []
    for rows in (1000, 3):
        heads.zero_grad()
        got = loss_of(heads, 1, hidden, blocks, layer, kind=kind, rows=rows)
        (0.64 * got.loss).backward()
        found.append([got.loss, got.accuracy, *(p.grad.clone() for p in heads.heads[1].parameters())])
    torch.testing.assert_close(found[0], found[1])
    assert all(bool(value.any()) for value in found[0][2:])


def test_kl_and_lk_vanish_for_a_head_that_says_what_the_backbone_will(layer: OutputLayer) -> None:
    class Clairvoyant(MedusaHeads):
        def guesses(self, states: Tensor, backbone: OutputLayer, head: int, *args: Any) -> Any:
            return super().guesses(self.later[: len(states)], backbone, head, *args)

    heads = Clairvoyant(MedusaConfig(hidden_size=D, vocab_size=V, num_heads=K, vocabulary="tied"))
    blocks, hidden = packed([[list(range(9))]]), torch.randn(1, 9, D)
    heads.later = hidden[0, 1:8]  # head 0 at t is compared with the backbone at t + 1, for t = 0 .. 6
    for kind in ("kl", "lk"):
        assert loss_of(heads, 0, hidden, blocks, layer, kind=kind).loss.abs() < 1e-6
    heads.later = hidden[0, 2:9]
    assert loss_of(heads, 0, hidden, blocks, layer, kind="kl").loss > 1e-2


@pytest.mark.parametrize("reads", READS)
def test_drawn_positions_are_all_that_counts(layer: OutputLayer, reads: str) -> None:
    blocks, hidden = packed([[list(range(9))], [[3, 1, 4, 1, 5, 9, 2, 6, 5]]]), torch.randn(2, 9, D)
    heads = noisy_heads(layer, reads=reads)
    # Of 14 positions (t = 0 .. 6 in two rows) the third, seventh and eighth; the seventh is the first head's alone.
    got = [loss_of(heads, head, hidden, blocks, layer, draw=lambda n: torch.tensor([2, 6, 7])) for head in range(2)]
    first, second = [(0, 2, 4), (0, 6, 8), (1, 0, 4)], [(0, 2, 5), (1, 0, 1)]
    for head, pairs in enumerate((first, second)):
        torch.testing.assert_close(got[head].loss, by_hand(heads, head, hidden, layer, pairs, blocks))
    counts: list[int] = []
    whole = loss_of(heads, 0, hidden, blocks, layer, draw=lambda n: (counts.append(n), torch.arange(n))[1])
    assert counts == [14]
    torch.testing.assert_close(whole.loss, loss_of(heads, 0, hidden, blocks, layer).loss)


@pytest.mark.parametrize("kind", ["ce", "kl", "lk"])
def test_padding_changes_nothing(layer: OutputLayer, kind: str) -> None:
    heads, hidden = noisy_heads(layer), torch.randn(1, 9, D)
    blocks = packed([[[1, 2, 3, 4, 5, 6, 7, 8, 9]]])
    want = loss_of(heads, 0, hidden, blocks, layer, kind=kind)
    positions = torch.cat([blocks.position_ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    labels = torch.cat([blocks.labels, torch.full((1, 5), IGNORED)], dim=1)
    longer = Blocks(functional.pad(blocks.input_ids, (0, 5)), positions, labels)
    got = loss_of(heads, 0, torch.cat([hidden, torch.randn(1, 5, D)], dim=1), longer, layer, kind=kind)
    torch.testing.assert_close((got.loss, got.accuracy), (want.loss, want.accuracy))


def test_lk_goes_from_divergence_to_the_accepted_share(layer: OutputLayer) -> None:
    heads, hidden, blocks = noisy_heads(layer), torch.randn(1, 9, D), packed([[list(range(9))]])
    ours, theirs = heads(hidden[0, :7], layer, 0).softmax(-1), layer.logits(hidden[0, 1:8]).softmax(-1)
    accepted = torch.minimum(ours, theirs).sum(-1)
    divergence = (theirs * (theirs.log() - ours.log())).sum(-1)
    for eta, want in ((0.0, divergence), (1e6, 1 - accepted)):
        torch.testing.assert_close(loss_of(heads, 0, hidden, blocks, layer, kind="lk", eta=eta).loss, want.mean())
    weight = torch.exp(-3.0 * accepted)
    want = (weight * divergence + (1 - weight) * (1 - accepted)).mean()
    torch.testing.assert_close(loss_of(heads, 0, hidden, blocks, layer, kind="lk").loss, want)


def test_what_a_pruned_head_cannot_name_teaches_nothing_and_is_missed(layer: OutputLayer) -> None:
    heads, hidden = noisy_heads(layer, vocabulary="pruned", draft_vocab_size=4), torch.randn(1, 6, D)
    blocks = packed([[[0, 1, 2, 9, 10, 4]]])  # tokens 1 to 4 can be named: of the targets 2, 9, 10, 4 two
    got = loss_of(heads, 0, hidden, blocks, layer)
    want = by_hand(heads, 0, hidden, layer, [(0, 0, 1), (0, 3, 3)])
    torch.testing.assert_close(got.loss, want)
    hits = [heads(hidden[0, t], layer, 0).argmax() == number for t, number in ((0, 1), (3, 3))]
    assert got.accuracy.item() == pytest.approx(sum(map(bool, hits)) / 4)


def test_a_batch_without_a_target_has_a_loss_of_zero(layer: OutputLayer) -> None:
    heads, hidden, blocks = noisy_heads(layer), torch.randn(1, 4, D), packed([[[1], [2], [3], [4]]])
    for kind in ("ce", "kl", "lk"):
        got = loss_of(heads, 0, hidden, blocks, layer, kind=kind)
        got.loss.backward()
        assert got.loss == 0 and got.accuracy == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in heads.heads[0].parameters())
