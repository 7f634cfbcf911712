"""Draft trees: which guesses are verified together in one backbone call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Choice = tuple[int, ...]


def order_choices(choices: Iterable[Sequence[int]]) -> tuple[Choice, ...]:
    """Choices in the order of the nodes 1..N of `Tree.from_choices`: by depth, then as tuples, each once."""
    return tuple(sorted({tuple(choice) for choice in choices}, key=lambda choice: (len(choice), choice)))


@dataclass(frozen=True)
class Tree:
    """A tree of N guesses below the root, which is the token already chosen but not yet in the cache.

    Nodes are sorted by depth, so the first n nodes of a tree are a tree.  Several siblings may carry the same token.

    Attributes:
        parents: index of every node's parent; node 0 is the root, with parent -1.
    """

    parents: tuple[int, ...]
    _prefixes: dict[int, Tree] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"parents begins {self.parents[:1]}, but node 0 is the root and its parent is -1")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} has parent {parent}, but a parent must be one of the nodes before it")
        for node in range(1, len(self)):
            if self.depths[node] < self.depths[node - 1]:
                raise ValueError(f"node {node} at depth {self.depths[node]} follows a deeper one: sort nodes by depth")

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(parents: tuple[int, ...]) -> Tree:
        """The tree of these parents, kept with what was derived of it: steps with trees of their own repeat them."""
        return Tree(parents)

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]]) -> Tree:
        """A tree whose node (c_1, .., c_m) is the c_m-th best guess (from 0) at depth m, below (c_1, .., c_{m-1}).

        Node i+1 is entry i of `order_choices(choices)`.

        Raises:
            ValueError: an empty or negative choice, or one whose parent is not there.
        """
        ordered = order_choices(choices)
        index: dict[Choice, int] = {(): 0}
        parents = [-1]
        for choice in ordered:
            if not choice or min(choice) < 0:
                raise ValueError(f"choice {choice} must be a tuple of ranks from 0, one for each depth from 1")
            if choice[:-1] not in index:
                raise ValueError(f"choice {choice} has no parent: add {choice[:-1]}")
            parents.append(index[choice[:-1]])
            index[choice] = len(index)
        return cls(tuple(parents))

    @staticmethod
    @lru_cache(maxsize=64)
    def chain(length: int) -> Tree:
        """`length` guesses below each other; 0 is the root alone."""
        return Tree(tuple(range(-1, length)))

    @classmethod
    def dense(cls, widths: Sequence[int]) -> Tree:
        """Every node at depth d has `widths[d]` children."""
        choices: list[Choice] = [()]
        level: list[Choice] = [()]
        for width in widths:
            level = [(*choice, rank) for choice in level for rank in range(width)]
            choices += level
        return cls.from_choices(choices[1:])

    def __len__(self) -> int:
        """Nodes, the root among them: rows of one verification."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Depth of the deepest node: at most so many guesses are accepted at once."""
        return self.depths[-1]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node; the root's is 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node, in order."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            below[parent].append(node)
        return tuple(map(tuple, below))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For every node the nodes from the root to it, both included."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(self.parents[1:], start=1):
            paths.append((*paths[parent], node))
        return tuple(paths)

    def prefix(self, nodes: int) -> Tree:
        """The tree of the first nodes, the root among them; itself when it has no more."""
        if nodes >= len(self):
            return self
        if nodes not in self._prefixes:
            self._prefixes[nodes] = Tree(self.parents[: max(nodes, 1)])
        return self._prefixes[nodes]

    def no_deeper(self, depth: int) -> Tree:
        """The tree without the nodes below a depth."""
        return self if self.depth <= depth else self.prefix(sum(d <= depth for d in self.depths))

    def tables(self, device: torch.device) -> TreeTables:
        """The tree as tensors, kept for the trees in use."""
        return _tables(self, device)


@dataclass(frozen=True)
class TreeTables:
    """Trees as tensors.  Shapes: G trees (one for all rows, or one for each), M nodes with the root, D depth + 1.

    Attributes:
        parent: [G, M]; the root's parent is itself.
        depth: [G, M]; also what is added to the committed length to give a node's position.
        ancestors: [G, M, M] bool; [g, i, j] is true where j is i or an ancestor of i: who may be looked at.
        path: [G, M, D]; the nodes from the root to each node, then that node again up to D.
    """

    parent: Tensor
    depth: Tensor
    ancestors: Tensor
    path: Tensor

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device) -> TreeTables:
        """Tables of trees of equal size."""
        longest = max(tree.depth for tree in trees) + 1
        path = torch.tensor([[[*p, *[p[-1]] * (longest - len(p))] for p in tree.paths] for tree in trees])
        ancestors = torch.zeros(len(trees), path.shape[1], path.shape[1], dtype=torch.bool).scatter_(2, path, True)
        return cls(
            torch.tensor([[0, *tree.parents[1:]] for tree in trees]).to(device),
            torch.tensor([tree.depths for tree in trees]).to(device),
            ancestors.to(device),
            path.to(device),
        )


@lru_cache(maxsize=1024)
def _tables(tree: Tree, device: torch.device) -> TreeTables:
    return TreeTables.of((tree,), device)
