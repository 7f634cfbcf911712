"""What drafted decoding did: counted where it happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Work of drafted decoding since it was attached, or since `reset`.

    Attributes:
        generations: calls of `generate`; each has one prefill, which gives every sequence its first token.
        steps: backbone calls after the prefills.
        sequence_steps: the same, counted for each sequence that still grew.
        tokens: tokens emitted by these steps.
        nodes: rows that went through the backbone in these steps, of sequences that still grew.
        accepted: by number of guesses that were right, how often; of sequence steps.
    """

    generations: int = 0
    steps: int = 0
    sequence_steps: int = 0
    tokens: int = 0
    nodes: int = 0
    accepted: Counter[int] = field(default_factory=Counter)

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per backbone call after the prefill, for one sequence; plain decoding has 1."""
        return self.tokens / self.sequence_steps if self.sequence_steps else 1.0

    def reset(self) -> None:
        """Starts counting again."""
        self.__init__()  # type: ignore[misc]
