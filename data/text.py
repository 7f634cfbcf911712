"""Token documents and the fixed-length blocks that language models are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data.stepped import derive_seed, step_generator

IGNORED = -100  # transformers' label of what is not to be predicted


@dataclass(frozen=True)
class TokenDocument:
    """One text in tokens, its end token included; `learned` says of each whether it is to be predicted."""

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Blocks:
    """N blocks of L tokens: what a model is called with, and what it is to predict.

    input_ids: int64 [N, L].
    position_ids: int64 [N, L], zero again at every document border, by which transformers keeps documents apart (only
        if neither a cache nor an attention mask is in play: see `model_inputs`).
    labels: int64 [N, L], the block's own tokens (transformers shifts them); IGNORED where a token opens a document or
        is not to be learned.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, index: Tensor | slice) -> Blocks:
        """Some of the blocks."""
        return Blocks(self.input_ids[index], self.position_ids[index], self.labels[index])

    def tensors(self) -> dict[str, Tensor]:
        """The three by name."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}

    def to(self, device: torch.device | str) -> Blocks:
        """The same blocks on a device."""
        return Blocks(*(tensor.to(device) for tensor in self.tensors().values()))

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of a model's call under which no token attends to another document."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def segments(self) -> Tensor:
        """Which of the block's documents each token is of, int64 [N, L], rising from 0.

        What is predicted several tokens ahead crosses no border where both places have the same number.
        """
        return (self.position_ids == 0).cumsum(1) - 1


@dataclass(frozen=True)
class TokenStream:
    """Documents end to end.

    ids: int64 [T].
    begin: int64 [T], where in the stream the token's document begins.
    learned: bool [T].
    """

    ids: Tensor
    begin: Tensor
    learned: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, documents: Sequence[TokenDocument]) -> TokenStream:
        """The stream of these documents, in their order."""
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.long)
        return cls(
            torch.tensor([token for document in documents for token in document.ids], dtype=torch.long),
            (lengths.cumsum(0) - lengths).repeat_interleave(lengths),
            torch.tensor([learned for document in documents for learned in document.learned], dtype=torch.bool),
        )

    def head(self, count: int) -> TokenStream:
        """The first `count` tokens."""
        return TokenStream(self.ids[:count], self.begin[:count], self.learned[:count])

    def windows(self, starts: Tensor, length: int) -> Blocks:
        """The blocks [len(starts), length] that begin at the places `starts`."""
        place = starts[:, None] + torch.arange(length)
        ids, begin = self.ids[place], self.begin[place]
        learned = self.learned[place] & (place != begin)
        return Blocks(ids, place - torch.maximum(begin, starts[:, None]), ids.where(learned, IGNORED))


@dataclass(frozen=True)
class WindowOrder:
    """Which windows of a stream batch `n` holds: every epoch cuts it at other places and in another order."""

    stream: TokenStream
    length: int
    batch_size: int
    seed: int

    @cached_property
    def _per_epoch(self) -> int:
        count = len(self.stream) // self.length - 1
        if count < 1:
            raise ValueError(f"{len(self.stream)} tokens hold no two blocks of {self.length}: give more text")
        return count

    def batch(self, number: int) -> Blocks:
        """Batch `number`, a function of the seed and the number alone."""
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return self.stream.windows(torch.tensor([self._start(place) for place in places]), self.length)

    def _start(self, place: int) -> int:
        epoch, position = divmod(place, self._per_epoch)
        order = torch.randperm(self._per_epoch, generator=step_generator(self.seed, "order", epoch))
        return int(order[position]) * self.length + derive_seed(self.seed, "shift", epoch) % self.length


def pack(documents: Sequence[TokenDocument], length: int, pad: int, whole: bool = False) -> Blocks:
    """All documents in blocks of `length`.

    Args:
        pad: token that fills the blocks up; it is never to be predicted.
        whole: keep every document in one block (conversations, whose later turns need the earlier ones), cut at
            `length`; otherwise they are laid end to end and go on in the next block.
    Raises:
        ValueError: nothing to pack.
    """
    documents = [document for document in documents if len(document)]
    if not documents:
        raise ValueError("there is no text to make blocks of: all documents are empty")
    if whole:
        documents = _arranged(documents, length, pad)
    else:
        missing = -sum(map(len, documents)) % length
        documents = [*documents, *[_filling(missing, pad)] * (missing > 0)]
    stream = TokenStream.of(documents)
    return stream.windows(torch.arange(0, len(stream), length), length)


def _filling(count: int, pad: int) -> TokenDocument:
    return TokenDocument([pad] * count, [False] * count)


def _arranged(documents: Sequence[TokenDocument], length: int, pad: int) -> list[TokenDocument]:
    """Best fit, longest document first; then every block is filled up to `length`."""
    cut = [TokenDocument(document.ids[:length], document.learned[:length]) for document in documents]
    blocks: list[list[TokenDocument]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> numbers of the blocks that have just that many
    for document in sorted(cut, key=len, reverse=True):
        room = next((free for free in range(len(document), length) if with_room.get(free)), None)
        if room is None:
            blocks.append([])
            room, number = length, len(blocks) - 1
        else:
            number = with_room[room].pop()
        blocks[number].append(document)
        with_room.setdefault(room - len(document), []).append(number)
    filled = []
    for block in blocks:
        missing = length - sum(map(len, block))
        filled += [*block, *[_filling(missing, pad)] * (missing > 0)]
    return filled
