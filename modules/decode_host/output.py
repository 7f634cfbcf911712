"""What a drafted generation has emitted: ids, limits, streaming, and what `generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria


class Output:
    """The sequences of one `generate` call as they grow, on the host.

    Attributes:
        rows: ids of each sequence without its left padding.
        active: which sequences still take tokens.
    """

    def __init__(
        self, input_ids: Tensor, mask: Tensor | None, criteria: Any, config: Any, streamer: Any, device: torch.device
    ) -> None:
        """`device`: where logits processors and stopping criteria look at ids."""
        self.input_ids, self.streamer, self.device = input_ids, streamer, device
        prompt: list[list[int]] = input_ids.tolist()
        pads = [0] * len(input_ids) if mask is None else _leading_zeros(mask[:, -input_ids.shape[1] :])
        self.rows = [row[pad:] for row, pad in zip(prompt, pads, strict=True)]
        self._pads = [row[:pad] for row, pad in zip(prompt, pads, strict=True)]
        self._limit = criteria.max_length if criteria.max_length is not None else config.max_length
        eos = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self._ends = {int(token) for tokens in eos for token in tokens.reshape(-1)}
        # Without end tokens plain decoding lets all sequences grow until the last one is finished.
        self._ends_alone = bool(eos) or len(self.rows) == 1
        pad = config._pad_token_tensor
        self._pad = 0 if pad is None else int(pad)
        self._others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self._finish: list[int | None] = [None] * len(self.rows)
        self._scores: list[list[Tensor]] = [[] for _ in self.rows]
        self._logits: list[list[Tensor]] = [[] for _ in self.rows]
        self._streamed = input_ids.shape[1]

    @property
    def active(self) -> list[bool]:
        """Which sequences still take tokens."""
        finish = [self._limit if at is None else at for at in self._finish]
        if self._ends_alone:
            return [at is None for at in self._finish]
        return [self._length(row) < max(finish) for row in range(len(self.rows))]

    @property
    def room(self) -> int:
        """Most tokens that any active sequence can still take."""
        lengths = [self._length(row) for row, active in enumerate(self.active) if active]
        return self._limit - min(lengths) if lengths else 0

    def context(self, row: int) -> Tensor:
        """All ids [1, T] of a sequence, left padding included."""
        return torch.tensor([self._pads[row] + self.rows[row]], device=self.device)

    def take(self, row: int, tokens: Sequence[int]) -> int:
        """Adds tokens to a sequence, up to one that ends it; returns how many."""
        taken = 0
        for token in tokens[: self._limit - self._length(row)]:
            self.rows[row].append(token)
            taken += 1
            if self._finish[row] is None and self._is_end(row, token):
                self._finish[row] = self._length(row)
                if self._ends_alone:
                    break
        return taken

    def _is_end(self, row: int, token: int) -> bool:
        if token in self._ends or self._length(row) >= self._limit:
            return True
        if not self._others:
            return False
        context, scores = self.context(row), self._scores[row]
        seen = tuple(score[None] for score in scores[: self._taken(row)]) if scores else None
        return any(bool(criterion(context, seen).all()) for criterion in self._others)

    def record(self, row: int, scores: Tensor, logits: Tensor) -> None:
        """Keeps [n, V] of the next n tokens of a sequence; before `take`."""
        self._scores[row].extend(scores)
        self._logits[row].extend(logits)

    def _length(self, row: int) -> int:
        return len(self._pads[row]) + len(self.rows[row])

    def _taken(self, row: int) -> int:
        return self._length(row) - self.input_ids.shape[1]

    def stream(self) -> None:
        """Hands the tokens that all sequences have, or no longer need, to the streamer."""
        if self.streamer is None:
            return
        lengths = [self._length(row) for row in range(len(self.rows))]
        growing = [length for length, active in zip(lengths, self.active, strict=True) if active]
        until = min(growing) if growing else self._end
        for column in range(self._streamed, until):
            self.streamer.put(torch.tensor([self._at(row, column) for row in range(len(self.rows))]))
        self._streamed = max(self._streamed, until)

    def _at(self, row: int, column: int) -> int:
        index = column - len(self._pads[row])
        return self.rows[row][index] if index < len(self.rows[row]) else self._pad

    @property
    def _end(self) -> int:
        """Columns of the result: plain decoding goes on until the last sequence is finished."""
        return max(self._length(row) if at is None else at for row, at in enumerate(self._finish))

    def sequences(self) -> Tensor:
        """Prompt and output [B, T], ended sequences filled up with padding."""
        start = self.input_ids.shape[1]
        tail = [[self._at(row, column) for column in range(start, self._end)] for row in range(len(self.rows))]
        return torch.cat([self.input_ids, self.input_ids.new_tensor(tail)], dim=1)

    def result(self, config: Any, cache: Any) -> Any:
        """What `generate` returns."""
        if self.streamer is not None:
            self.streamer.end()
        if not config.return_dict_in_generate:
            return self.sequences()
        return GenerateDecoderOnlyOutput(
            sequences=self.sequences(),
            scores=self._by_token(self._scores) if config.output_scores else None,
            logits=self._by_token(self._logits) if config.output_logits else None,
            past_key_values=cache,
        )

    def _by_token(self, rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """One [B, V] for each token; zeros where a sequence had ended."""
        blank = torch.zeros_like(rows[0][0])
        return tuple(
            torch.stack([each[t] if t < self._taken(row) else blank for row, each in enumerate(rows)])
            for t in range(self._end - self.input_ids.shape[1])
        )


def _leading_zeros(mask: Tensor) -> list[int]:
    count: list[int] = (mask.cumsum(dim=1) == 0).sum(dim=1).tolist()
    return count
