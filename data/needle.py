"""Needles in a stream of noise: key-value pairs that are asked for at the end, and the copying task before it.

A row is noise with needles `(marker, key, value)` at random places, then questions `(ask, key, value)`; what is to be
predicted is the value after each question.  Decoys look like needles, and nobody asks for keys of their kind: who does
not know what is asked keeps them too.  Everything is a function of the generator that is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.contexts import ContextRows
from data.stepped import step_generator
from data.text import IGNORED

END, PAD, ASK = 0, 1, 2
MARKERS = range(3, 7)
KEYS = range(7, 39)
VALUES = range(39, 71)
NOISE = range(71, 135)
VOCABULARY = NOISE.stop
ASKED_KEYS = KEYS[: len(KEYS) // 2]
"""Of rows with decoys: the keys of the needles; the decoys have the others."""

Style = Literal["plain", "shifted", "any"]
"""Which half of the markers and of the noise a row draws from; `any` draws from all of them."""

_HALVES = {"plain": (0.0, 0.5), "shifted": (0.5, 1.0), "any": (0.0, 1.0)}


def words() -> list[str]:
    """What each token is called, in the order of their ids."""
    groups = (("marker", MARKERS), ("key", KEYS), ("value", VALUES), ("noise", NOISE))
    return ["<end>", "<pad>", "ask", *(f"{name}{number}" for name, ids in groups for number in range(len(ids)))]


def needle_rows(
    count: int,
    context: int,
    generator: torch.Generator,
    *,
    needles: int = 8,
    questions: int = 8,
    decoys: int = 0,
    known: bool = False,
    style: Style = "plain",
) -> ContextRows:
    """`count` rows; needles' keys are different within a row, and the questions ask for different ones of them.

    What is to be predicted is each question's last token.

    Args:
        decoys: needles that are never asked for.  They have keys of the half that is no needle's where there are any.
        known: the contexts end with the questions, which are then repeated and answered.
    Raises:
        ValueError: more needles than keys or than fit the context, or more questions than needles.
    """
    kinds = _asked(context, needles, questions, decoys)
    marked = needles + decoys
    noise, markers = _half(NOISE, style), _half(MARKERS, style)
    ids = _draw(noise, (count, context), generator)
    keys = _different(len(kinds), needles, count, generator) + kinds.start
    values = _draw(VALUES, (count, needles), generator)
    # Sorted different numbers below context - 2 marked, spread by 2 each, leave three tokens for every needle.
    starts = _different(context - 2 * marked, marked, count, generator).sort(1).values + 2 * torch.arange(marked)
    every_key, every_value = keys, values
    if decoys:
        starts = starts.gather(1, _different(marked, marked, count, generator))
        others = range(ASKED_KEYS.stop, KEYS.stop)
        every_key = torch.cat([keys, _draw(others, (count, decoys), generator)], dim=1)
        every_value = torch.cat([values, _draw(VALUES, (count, decoys), generator)], dim=1)
    for offset, tokens in enumerate((_draw(markers, (count, marked), generator), every_key, every_value)):
        ids.scatter_(1, starts + offset, tokens)
    asked = _different(needles, questions, count, generator)
    answers = values.gather(1, asked)
    tail = torch.stack([torch.full_like(asked, ASK), keys.gather(1, asked), answers], dim=2)
    if known:
        ids = torch.cat([ids, tail[..., :2].flatten(1)], dim=1)
    length = ids.shape[1]
    labels = torch.full((count, length + 3 * questions), IGNORED)
    labels[:, length + 2 :: 3] = answers
    return ContextRows(torch.cat([ids, tail.flatten(1)], dim=1), labels, length)


@dataclass(frozen=True)
class Needles:
    """Rows by number, see `data.contexts.ContextSource`.

    context: length of the contexts, the longest one where batches differ.
    name: what the numbers count within, as a split or a seed.
    shortest: every batch draws its length from here to `context`; None takes that.
    decoys: in each row, the most of them where batches differ.
    known: see `needle_rows`.
    fewest: every batch draws how many decoys it has from here to `decoys`; None takes that.
    """

    context: int
    needles: int = 8
    questions: int = 8
    style: Style = "plain"
    name: str | int = "training"
    count: int = 100_000
    shortest: int | None = None
    decoys: int = 0
    fewest: int | None = None
    known: bool = False

    def __post_init__(self) -> None:
        _asked(self.shortest or self.context, self.needles, self.questions, self.decoys)

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Tensor) -> ContextRows:
        """The rows of a batch, by the first of its numbers."""
        generator = step_generator("needles", self.name, self.style, int(index[0]))
        context, decoys = self.context, self.decoys
        if self.shortest is not None:
            context = int(torch.randint(self.shortest, context + 1, (), generator=generator))
        if self.fewest is not None:
            decoys = int(torch.randint(self.fewest, decoys + 1, (), generator=generator))
        settings = {"needles": self.needles, "questions": self.questions, "decoys": decoys, "known": self.known}
        return needle_rows(len(index), context, generator, style=self.style, **settings)


def _asked(context: int, needles: int, questions: int, decoys: int) -> range:
    """Keys that needles may have.  Raises ValueError where they do not suffice, or the context does not."""
    keys = ASKED_KEYS if decoys else KEYS
    if not 1 <= questions <= needles <= len(keys) or 3 * (needles + decoys) > context or decoys < 0:
        raise ValueError(
            f"{questions} questions about {needles} needles in {context} tokens, and {decoys} decoys: give 1 to "
            f"{len(keys)} needles, 3 tokens for each of both, and no more questions than needles"
        )
    return keys


def copy_rows(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels [count, length]: a random segment comes again at a random distance, to be predicted.

    With one distance for all a model would learn the distance, not to look for what came before.
    """
    size = length // 4
    ids = _draw(range(KEYS.start, NOISE.stop), (count, length), generator)
    first = torch.randint(0, length - 2 * size + 1, (count,), generator=generator)
    room = length - size - (first + size)
    second = first + size + (torch.rand(count, generator=generator) * (room + 1)).long()
    place = torch.arange(size)
    segment = ids.gather(1, first[:, None] + place)
    ids.scatter_(1, second[:, None] + place, segment)
    labels = torch.full_like(ids, IGNORED)
    labels.scatter_(1, second[:, None] + place[1:], segment[:, 1:])  # nothing announces the first token
    return ids, labels


def _half(ids: range, style: Style) -> range:
    first, last = _HALVES[style]
    return range(ids.start + round(first * len(ids)), ids.start + round(last * len(ids)))


def _draw(ids: range, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(ids.start, ids.stop, shape, generator=generator)


def _different(below: int, count: int, rows: int, generator: torch.Generator) -> Tensor:
    """[rows, count] numbers below `below`, different within a row."""
    return torch.rand(rows, below, generator=generator).topk(count, dim=1).indices
