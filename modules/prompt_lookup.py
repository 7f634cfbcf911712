"""Prompt lookup: guesses that the text goes on as it did after the last place that looked like its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from modules.contracts import Drafter
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.tree import Tree


class PromptLookup(Drafter):
    """A chain of what followed the last earlier occurrence of the longest n-gram that the text ends in.

    Nothing is learned and no hidden state is read.  A repetition that reaches the end of the text is continued
    periodically.  How often a chain was right, by n-gram length and depth, is kept over all generations: that is the
    chance which a shared tree goes by.

    Source: Saxena 2023, prompt-lookup-decoding (its first occurrence is our last).
    """

    needs_hidden = False

    def __init__(self, length: int = 8, longest: int = 3) -> None:
        """`length`: tokens drafted.  `longest`: n-gram length to begin with, down to 1."""
        if length < 1 or longest < 1:
            raise ValueError(f"length is {length} and longest is {longest}: both must be 1 or more")
        self.length, self.longest = length, longest
        self._texts: list[_Index] = []
        self._hits = [[0] * length for _ in range(longest + 1)]
        self._tries = [[0] * length for _ in range(longest + 1)]

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """See `Drafter`."""
        self._texts = [_Index(self.longest) for _ in prompts]

    def propose(self, state: DraftState) -> Draft:
        """See `Drafter`."""
        length = min(self.length, max(state.room - 1, 0))
        chains, chances = [], []
        for text, row, active in zip(self._texts, state.rows, state.active, strict=True):
            self._learn(text, row)
            text.read(row)
            chain, matched = text.lookup(row, length) if active else ([], 0)
            text.drafted, text.matched, text.at = chain, matched, len(row)
            chains.append(chain + [-1] * (length - len(chain)))
            chances.append(self.chances(matched)[:length])
        if all(chain[:1] == [-1] for chain in chains):
            length = 0
        tokens = torch.tensor([chain[:length] for chain in chains], dtype=torch.long)
        return Draft(Tree.chain(length), tokens.reshape(len(chains), length), [c[:length] for c in chances])

    def _learn(self, text: _Index, row: Sequence[int]) -> None:
        """Notes how far the last chain was right, as far as the text has come since."""
        came = row[text.at :]
        pairs = zip(text.drafted, came, strict=False)
        right = next((i for i, (guess, token) in enumerate(pairs) if guess != token), min(len(text.drafted), len(came)))
        # Where the text has come no further, nobody knows; below a wrong guess all are wrong.
        known = right if right == min(len(text.drafted), len(came)) else len(text.drafted)
        for depth in range(known):
            self._tries[text.matched][depth] += 1
            self._hits[text.matched][depth] += depth < right
        text.drafted = []

    def chances(self, matched: int) -> list[float]:
        """How probable a chain is to be right down to each depth, by what was seen after n-grams of this length."""
        chances, above = [], 1.0
        for hits, tries in zip(self._hits[matched], self._tries[matched], strict=True):
            # Weighs as four tries before anything was seen: even bets, one on top of the other.
            above = min(above, (hits + 4 * above / 2) / (tries + 4))
            chances.append(above)
        return chances

    def memory_bytes(self) -> int:
        """See `Drafter`."""
        return sum(text.memory_bytes() for text in self._texts)


class _Index:
    """Where each n-gram of one text last ended, except the one at its very end."""

    def __init__(self, longest: int) -> None:
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.count = 0
        self.drafted: list[int] = []
        self.matched = self.at = 0

    def read(self, row: Sequence[int]) -> None:
        """Takes in what was added, but for the last token: the text's own end is no earlier occurrence."""
        for end in range(self.count, len(row) - 1):
            for n, ends in enumerate(self.ends, start=1):
                if end + 1 >= n:
                    ends[tuple(row[end + 1 - n : end + 1])] = end
        self.count = max(self.count, len(row) - 1)

    def lookup(self, row: Sequence[int], length: int) -> tuple[list[int], int]:
        """What followed, and how long the n-gram was; nothing and 0 where even the last token is new."""
        for n in range(min(len(self.ends), len(row)), 0, -1):
            end = self.ends[n - 1].get(tuple(row[-n:]))
            if end is not None:
                period = len(row) - 1 - end
                followed = list(row[end + 1 : end + 1 + min(length, period)])
                while len(followed) < length:
                    followed.append(followed[-period])
                return followed, n
        return [], 0

    def memory_bytes(self) -> int:
        keys = sum(sys.getsizeof(key) for ends in self.ends for key in ends)
        return keys + sum(map(sys.getsizeof, self.ends))
