"""Long contexts and what follows them: what is compressed, and what then has to be predicted from what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.records import Record, tokenize
from data.text import IGNORED, TokenStream


@dataclass(frozen=True)
class ContextRows:
    """B rows of C tokens of context and some that follow.

    input_ids: int64 [B, L].
    labels: int64 [B, L], the row's own tokens where they are to be predicted, all behind the context; else IGNORED.
    context: C.
    """

    input_ids: Tensor
    labels: Tensor
    context: int

    def __len__(self) -> int:
        return len(self.input_ids)


class ContextSource(Protocol):
    """Numbered rows."""

    def __len__(self) -> int:
        """How many there are."""

    def rows(self, index: Tensor) -> ContextRows:
        """The rows of these numbers, a function of the numbers alone."""


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text: each row's last tokens follow its context."""

    stream: TokenStream
    context: int
    following: int

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(
                f"the text has {len(self.stream)} tokens, and a row takes {self.context + self.following}: give more "
                "text, or a shorter context"
            )

    def __len__(self) -> int:
        return len(self.stream) // (self.context + self.following)

    def rows(self, index: Tensor) -> ContextRows:
        """See `ContextSource`."""
        blocks = self.stream.windows(index * (self.context + self.following), self.context + self.following)
        labels = blocks.labels.clone()
        labels[:, : self.context] = IGNORED
        return ContextRows(blocks.input_ids, labels, self.context)


@dataclass(frozen=True)
class AnsweredPrompts:
    """Prompts and their answers, one a row: the prompt is the context, cut to its last `context` tokens."""

    pairs: Sequence[tuple[list[int], list[int]]]
    context: int

    @classmethod
    def of(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, context: int) -> AnsweredPrompts:
        """Of records with one prompt and one answer; of conversations the first answer counts.

        Raises:
            ValueError: a record has no prompt, or none is left.
        """
        pairs = []
        for record in records:
            document = tokenize(record, tokenizer)
            first = next((i for i, learned in enumerate(document.learned) if learned), 0)
            last = next((i for i in range(first, len(document)) if not document.learned[i]), len(document))
            if first == 0 or "text" in record:
                raise ValueError("data.kind pairs needs records with a prompt and a response, or messages")
            pairs.append((document.ids[:first], document.ids[first:last]))
        if not pairs:
            raise ValueError("there are no prompts with answers to learn from")
        return cls(pairs, context)

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, index: Tensor) -> ContextRows:
        """See `ContextSource`.  Raises ValueError for more than one row: prompts differ in length."""
        if len(index) != 1:
            raise ValueError("prompts differ in length, so data.kind pairs takes one a batch: set data.batch_size to 1")
        prompt, answer = self.pairs[int(index)]
        prompt = prompt[-self.context :]
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = IGNORED
        return ContextRows(ids, labels, len(prompt))
