"""Two drafters in one tree: each step verifies the best guesses of both."""

from __future__ import annotations

from collections.abc import Sequence

from modules.contracts import Drafter
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.merge import Branches, pack


class Hybrid(Drafter):
    """Merges the branches of two drafters: every path once, the most probable `nodes` of them.

    Drafters that know how probable their nodes are (`Draft.chance`) share the tree fairly; for one that does not, each
    depth is an even bet.
    """

    def __init__(self, first: Drafter, second: Drafter, nodes: int = 16) -> None:
        """`nodes`: of the merged tree, below the root."""
        if nodes < 1:
            raise ValueError(f"nodes is {nodes}, but a tree to share has 1 or more")
        self.members, self.nodes = (first, second), nodes
        self.needs_hidden = first.needs_hidden or second.needs_hidden
        readers = [tuple(member.hidden_layers) for member in self.members if member.needs_hidden]
        if len(set(readers)) > 1:
            raise ValueError(f"two drafters of one tree read the same hidden states, and these read layers {readers}")
        self.hidden_layers = readers[0] if readers else ()

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """See `Drafter`."""
        for member in self.members:
            member.begin(prompts)

    def propose(self, state: DraftState) -> Draft:
        """See `Drafter`."""
        rows = [Branches() for _ in state.rows]
        for member in self.members:
            draft = member.propose(state)
            for row, tokens in enumerate(draft.tokens.tolist()):
                rows[row].add_draft(draft, row, tokens)
        return pack(rows, self.nodes)

    def end(self, rows: Sequence[Sequence[int]]) -> None:
        """See `Drafter`."""
        for member in self.members:
            member.end(rows)

    def memory_bytes(self) -> int:
        """See `Drafter`."""
        return sum(member.memory_bytes() for member in self.members)
