"""What drafters are shown, and what they give back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from modules.decode_host.tree import Tree


@dataclass(frozen=True)
class DraftState:
    """What a drafter may look at.  Shapes: B sequences, D hidden size.

    Attributes:
        rows: ids of each sequence, prompt and output, without padding.  The last one is the root: chosen, not yet in
            the cache.  Read only; the lists grow as decoding goes on.
        root: [B]; the last ids once more, on the backbone's device.
        hidden: [B, D]; what entered the backbone's output matrix when it chose the root, or None for a drafter that
            does not need it.
        active: which sequences still grow; guesses for the others are ignored.
        room: most tokens that any sequence can take now: guesses at this depth or deeper are cut off.
    """

    rows: Sequence[Sequence[int]]
    root: Tensor
    hidden: Tensor | None
    active: Sequence[bool]
    room: int


@dataclass(frozen=True)
class Draft:
    """The guesses of one step.  Shapes: B sequences, N nodes below the root.

    Attributes:
        tree: one for all sequences, or one of equal size for each.
        tokens: [B, N]; token of every node but the root, in the trees' order; -1 where a sequence has no guess.
        chance: per sequence, how probable each of its nodes is to be accepted, where the drafter can tell.  Never
            more than the parent's.  Only for sharing a tree between drafters.
    """

    tree: Tree | tuple[Tree, ...]
    tokens: Tensor
    chance: Sequence[Sequence[float]] | None = None

    def tree_of(self, row: int) -> Tree:
        """The tree of one sequence."""
        return self.tree if isinstance(self.tree, Tree) else self.tree[row]
