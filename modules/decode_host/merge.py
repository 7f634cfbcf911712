"""Branches of guesses that grow into one tree: every path once, the most probable nodes first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modules.decode_host.draft import Draft
from modules.decode_host.tree import Tree


class Branches:
    """Guessed paths below a root with their chances, each path once."""

    def __init__(self) -> None:
        self.chances: dict[tuple[int, ...], float] = {}

    def __len__(self) -> int:
        return len(self.chances)

    def add(self, path: tuple[int, ...], chance: float) -> None:
        """A path whose parent is there already; of several chances the best counts, up to the parent's."""
        chance = max(chance, self.chances.get(path, 0.0))
        self.chances[path] = min(chance, self.chances[path[:-1]]) if len(path) > 1 else chance

    def add_draft(self, draft: Draft, row: int, tokens: Sequence[int]) -> None:
        """All nodes of a draft; without chances of its own each depth is an even bet."""
        tree = draft.tree_of(row)
        paths: list[tuple[int, ...] | None] = [()]
        for node, token in enumerate(tokens, start=1):
            above = paths[tree.parents[node]]
            path = None if above is None or token < 0 else (*above, token)
            paths.append(path)
            if path is not None:
                chances = None if draft.chance is None else draft.chance[row]
                self.add(path, 0.5 ** len(path) if chances is None else chances[node - 1])

    def best(self, nodes: int) -> list[tuple[int, ...]]:
        """The most probable paths, sorted by depth; with each its parent."""
        paths = self.chances
        if len(paths) > nodes:
            kept = sorted(paths, key=lambda path: (-paths[path], len(path)))[:nodes]
            return sorted(kept, key=len)
        return sorted(paths, key=len)


def pack(rows: Sequence[Branches], nodes: int) -> Draft:
    """A draft of each sequence's `nodes` most probable paths, filled up where sequences have unequally many."""
    chosen = [branches.best(nodes) for branches in rows]
    size = max(map(len, chosen))
    trees, tokens, chances = [], [], []
    for branches, paths in zip(rows, chosen, strict=True):
        index = {(): 0} | {path: node for node, path in enumerate(paths, start=1)}
        parents = [-1, *(index[path[:-1]] for path in paths)]
        # What fills up goes beside the deepest node, so that nodes stay sorted by depth.
        parents += [max(parents[-1], 0)] * (size - len(paths))
        trees.append(Tree.of(tuple(parents)))
        tokens.append([path[-1] for path in paths] + [-1] * (size - len(paths)))
        chances.append([branches.chances[path] for path in paths] + [0.0] * (size - len(paths)))
    packed = torch.tensor(tokens, dtype=torch.long).reshape(len(rows), size)
    return Draft(trees[0] if len(trees) == 1 else tuple(trees), packed, chances)
