"""What Medusa's heads are made of, as the adapter stores it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modules.decode_host.search import accuracy

VOCABULARIES = ("own", "tied", "pruned", "low_rank")
READS = ("state", "root", "path")


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """All it takes to rebuild the heads and their tree: the adapter's "module" entry.

    Attributes:
        hidden_size, vocab_size: of the backbone.
        num_heads: K; head k (from 0) guesses the token k + 2 places ahead, the backbone itself the one 1 place ahead.
        num_blocks: residual blocks of each head, L.
        vocabulary: how a head's state becomes logits: "own" (a matrix of its own), "tied" (the backbone's), "pruned"
            (an own matrix over `draft_vocab_size` tokens only), "low_rank" (the backbone's plus a product of rank
            `rank`).
        reads: what a head guesses from beside the hidden state: "state" (nothing, Medusa), "root" (the token that the
            backbone chose from it), "path" (that one, and the guesses that lead to its own: one cell for all heads).
        layers: decoder layers, by number from 1, whose outputs the heads read beside the last hidden state.
        output_bias: own and pruned matrices come with a bias, as the backbone's does.
        tree: the nodes of the drafted tree but its root, each as the ranks (from 0) that lead to it, parents first.
        hits: hits[k][r], how often rank r of head k was the token that the backbone went on to produce.
        counts: counts[k], how often head k was compared.
        lora: PEFT's settings of the backbone's own adapter (Medusa-2), or None.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_blocks: int = 1
    vocabulary: str = "tied"
    draft_vocab_size: int | None = None
    rank: int | None = None
    reads: str = "state"
    layers: list[int] = field(default_factory=list)
    output_bias: bool = False
    tree: list[list[int]] = field(default_factory=list)
    hits: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    lora: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary is {self.vocabulary!r}, which is not one of {', '.join(VOCABULARIES)}")
        for name in ("hidden_size", "vocab_size", "num_heads", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.reads not in READS:
            raise ValueError(f"reads is {self.reads!r}, which is not one of {', '.join(READS)}")
        if sorted(set(self.layers)) != list(self.layers) or min(self.layers, default=1) < 1:
            raise ValueError(f"layers is {self.layers}: name each layer once, from 1, in their order")
        if (self.draft_vocab_size is not None) != (self.vocabulary == "pruned"):
            raise ValueError(f"draft_vocab_size is {self.draft_vocab_size} with vocabulary {self.vocabulary}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size is {self.draft_vocab_size}, not within 1 to {self.vocab_size}")
        if (self.rank is not None) != (self.vocabulary == "low_rank"):
            raise ValueError(f"rank is {self.rank} with vocabulary {self.vocabulary}")
        if len(self.hits) != len(self.counts) or len(self.counts) not in (0, self.num_heads):
            raise ValueError(
                f"hits and counts are of {len(self.hits)} and {len(self.counts)} heads, but there are {self.num_heads}"
            )

    def tokens_read(self, head: int) -> int:
        """How many of the tokens after the state a head reads, the root first."""
        return {"state": 0, "root": 1, "path": head + 1}[self.reads]

    @property
    def one_cell(self) -> bool:
        """All heads are one module, applied once more for every token of the path."""
        return self.reads == "path"

    @property
    def output_size(self) -> int:
        """How many tokens a head tells apart."""
        return self.draft_vocab_size or self.vocab_size

    def accuracy(self) -> list[list[float]]:
        """accuracy[k][r]: share of rank r's hits among head k's comparisons; empty without a calibration."""
        return accuracy(self.hits, self.counts)
