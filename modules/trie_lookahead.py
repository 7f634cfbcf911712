"""Trie lookahead: guesses branch as what followed the last tokens did, in this request and in earlier answers."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from modules.contracts import Drafter
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.merge import Branches, pack


class TrieLookahead(Drafter):
    """The most frequent continuations of the last two tokens, then of the last one, as a tree.

    Each request has a trie of its own text; one trie of all answers outlives the requests.  A continuation counts by
    its own frequency in the request plus a little of the shared one.

    Source: Zhao et al. 2024, "Lookahead: An Inference Acceleration Framework", arXiv:2312.12728 (not the lookahead
    decoding of the same name).
    Departs from it: a trie over its limit drops what was seen once before it halves what is left.
    """

    needs_hidden = False

    def __init__(self, nodes: int = 16, branch: int = 12, shared_weight: float = 1e-4, limit: int = 65_536) -> None:
        """
        Args:
            nodes: drafted per step, below the root.
            branch: longest continuation that is kept.
            shared_weight: of a continuation's frequency in earlier answers, against 1 in the request.
            limit: nodes of a trie above which it is squeezed.
        """
        if nodes < 1 or branch < 1 or limit < 1:
            raise ValueError(f"nodes is {nodes}, branch {branch} and limit {limit}: all must be 1 or more")
        self.nodes, self.branch, self.shared_weight, self.limit = nodes, branch, shared_weight, limit
        self.shared = Trie(branch, limit)
        self._own: list[Trie] = []
        self._answers: list[int] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """See `Drafter`."""
        self._own = [Trie(self.branch, self.limit) for _ in prompts]
        self._answers = [len(prompt) for prompt in prompts]

    def propose(self, state: DraftState) -> Draft:
        """See `Drafter`."""
        rows = []
        for own, row, active in zip(self._own, state.rows, state.active, strict=True):
            own.read(row)
            rows.append(self._branches(own, row) if active else Branches())
        return pack(rows, self.nodes)

    def _branches(self, own: Trie, row: Sequence[int]) -> Branches:
        branches = Branches()
        for length in (2, 1):
            for path, chance in self._best((own.find(row[-length:]), self.shared.find(row[-length:]))):
                if len(branches) == self.nodes:
                    break
                branches.add(path, chance)
        return branches

    def _best(self, places: Places) -> Iterator[tuple[tuple[int, ...], float]]:
        """Paths below, the most frequent first, then the shortest; none is more frequent than its parent."""
        seen = sum(_seen(_below(places, token)) for token in _tokens(places))
        heap: list[tuple[float, int, tuple[int, ...], Places]] = [(0.0, 0, (), places)]
        while heap:
            _, depth, path, places = heapq.heappop(heap)
            if path:
                # One more than was seen: what came once may well not come again.
                yield path, _seen(places) / (seen + 1)
            for token in _tokens(places):
                below = _below(places, token)
                own, shared = (0 if node is None else node.count for node in below)
                heapq.heappush(heap, (-own - self.shared_weight * shared, depth + 1, (*path, token), below))

    def end(self, rows: Sequence[Sequence[int]]) -> None:
        """See `Drafter`."""
        for row, start in zip(rows, self._answers, strict=True):
            self.shared.close()
            # The answer's first tokens are found by the last ones of its prompt.
            self.shared.read(row[max(start - 2, 0) :])
        self.shared.close()

    def memory_bytes(self) -> int:
        """See `Drafter`."""
        return sum(trie.memory_bytes() for trie in (self.shared, *self._own))


class Node:
    """A token after the path to it: how often, and what came then."""

    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0
        self.children: dict[int, Node] = {}


Places: TypeAlias = tuple[Node | None, Node | None]  # of the request's own trie, and of the shared one


def _tokens(places: Places) -> set[int]:
    return {token for node in places if node is not None for token in node.children}


def _below(places: Places, token: int) -> Places:
    own, shared = places
    return own and own.children.get(token), shared and shared.children.get(token)


def _seen(places: Places) -> int:
    return sum(node.count for node in places if node is not None)


class Trie:
    """All stretches of a text up to `branch` tokens after a key of two."""

    def __init__(self, branch: int, limit: int) -> None:
        self.depth, self.limit, self.size = branch + 2, limit, 0
        self.root = Node()
        self._open: list[Node] = []
        self._read = 0

    def read(self, row: Sequence[int]) -> None:
        """Takes in what a growing text has gained since the last call."""
        for token in row[self._read :]:
            self._open = [self._step(node, token) for node in (self.root, *self._open[: self.depth - 1])]
        self._read = len(row)
        while self.size > self.limit:
            self._squeeze()

    def close(self) -> None:
        """Ends a text; the next one begins at its first token."""
        self._open, self._read = [], 0

    def _step(self, node: Node, token: int) -> Node:
        child = node.children.get(token)
        if child is None:
            child = node.children[token] = Node()
            self.size += 1
        child.count += 1
        return child

    def find(self, key: Sequence[int]) -> Node | None:
        """The node of a path from the root."""
        node: Node | None = self.root
        for token in key:
            node = None if node is None else node.children.get(token)
        return node

    def _squeeze(self) -> None:
        # The text goes on from nodes that may be dropped: it starts anew.
        self._open, self.size = [], 0
        stack = [self.root]
        while stack:
            node = stack.pop()
            node.children = {token: child for token, child in node.children.items() if child.count > 1}
            for child in node.children.values():
                child.count //= 2
            self.size += len(node.children)
            stack += node.children.values()

    def memory_bytes(self) -> int:
        """Bytes of the nodes and their tables."""
        total, stack = 0, [self.root]
        while stack:
            node = stack.pop()
            total += sys.getsizeof(node) + sys.getsizeof(node.children)
            stack += node.children.values()
        return total
