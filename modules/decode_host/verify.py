"""Verifying a tree of guesses: logits processors with each node's own context, then a rule of acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from modules.decode_host.rules import Rule
from modules.decode_host.tree import Tree, TreeTables

# Processors that look at the scores alone: one call does for all nodes.  Any other one is called as plain decoding
# calls it, token by token along the path.
CONTEXT_FREE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
)
# Processors that remember their calls, or let the user's code tell sequences apart.
ONE_SEQUENCE = (
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)


@dataclass(frozen=True)
class Verdict:
    """What a verification kept of each sequence.

    Attributes:
        last: the last kept node of each sequence.
        tokens: tokens of the kept nodes below the root, and the one that follows.
        root: [B], the last of `tokens`: the next tree's root.
        scores: [M or fewer, V] of each sequence by kept node, after the processors; only where asked for.
    """

    last: list[int]
    tokens: list[list[int]]
    root: Tensor
    scores: list[Tensor] | None = None


class Verifier:
    """A rule of acceptance behind a list of logits processors."""

    def __init__(self, rule: Rule, processors: Sequence[Any], batch: int, keep_scores: bool) -> None:
        strange = [type(p).__name__ for p in processors if isinstance(p, ONE_SEQUENCE)]
        if batch > 1 and strange:
            raise ValueError(f"{strange[0]} works on {batch} sequences in step only: generate one sequence at a time")
        self.rule, self.keep_scores, self.batch = rule, keep_scores, batch
        self.processors: Any = processors
        self.context_free = all(type(p) in CONTEXT_FREE for p in processors)
        rule.begin(batch)

    def __call__(
        self,
        logits: Tensor,
        tokens: Tensor,
        trees: Sequence[Tree],
        tables: TreeTables,
        context: Callable[[int], Tensor],
        active: Sequence[bool],
    ) -> Verdict:
        """Judges a step.

        Args:
            logits: [B, M, V], raw.
            tokens: [B, M], the root's first.
            trees: one, or one for each sequence; `tables` are theirs.
            context: ids [1, T] of a sequence up to its root, left padding included; asked for where processors look.
        """
        if self.context_free:
            return self._whole(logits, tokens, trees, tables)
        return self._by_path(logits, tokens.tolist(), trees, context, active)

    def _whole(self, logits: Tensor, tokens: Tensor, trees: Sequence[Tree], tables: TreeTables) -> Verdict:
        scores = logits
        if self.processors:
            flat = logits.flatten(0, 1).to(torch.float32, copy=True)
            scores = self.processors(tokens.reshape(-1, 1), flat).view(logits.shape)
        last, root = self.rule.keep(scores, tokens, tables)
        # The only transfer to the host of a step.
        told = torch.cat([last[:, None], root[:, None], tokens], dim=1).tolist()
        paths = [_tree(trees, number).paths[row[0]] for number, row in enumerate(told)]
        taken = [[*(row[2 + node] for node in path[1:]), row[1]] for row, path in zip(told, paths, strict=True)]
        kept = [scores[row, list(path)].float() for row, path in enumerate(paths)] if self.keep_scores else None
        return Verdict([path[-1] for path in paths], taken, root, kept)

    def _by_path(
        self,
        logits: Tensor,
        tokens: list[list[int]],
        trees: Sequence[Tree],
        context: Callable[[int], Tensor],
        active: Sequence[bool],
    ) -> Verdict:
        walks = [
            self._walk(row, logits[row], tokens[row], _tree(trees, row), context(row))
            if active[row]
            else _Walk([0], [tokens[row][0]], 0.0, [])
            for row in range(len(tokens))
        ]
        root = torch.tensor([walk.tokens[-1] for walk in walks], device=logits.device)
        kept = [torch.cat(walk.scores) if walk.scores else logits[row, :1] for row, walk in enumerate(walks)]
        return Verdict([w.path[-1] for w in walks], [w.tokens for w in walks], root, kept if self.keep_scores else None)

    def _walk(self, row: int, logits: Tensor, tokens: list[int], tree: Tree, context: Tensor) -> _Walk:
        """The best path from a node on: depth first over the kept children, of which an exact rule has one at most."""

        def visit(node: int, depth: int, context: Tensor) -> _Walk:
            scores = self._process(row, context, logits[node])
            children = tree.children[node]
            kept, following = self.rule.keep_one(scores, row, depth, [tokens[child] for child in children])
            best = _Walk([node], [following], 0.0, [scores])
            for index, log in kept.items():
                token = tokens[children[index]]
                below = visit(children[index], depth + 1, torch.cat([context, context.new_tensor([[token]])], dim=1))
                walk = _Walk([node, *below.path], [token, *below.tokens], log + below.log, [scores, *below.scores])
                best = max(best, walk, key=lambda walk: (len(walk.path), walk.log))
            return best

        return visit(0, 0, context)

    def _process(self, row: int, context: Tensor, logits: Tensor) -> Tensor:
        # Some processors know the batch, the prompts' padding for one: every sequence is this one, at its own place.
        scores: Tensor = self.processors(context.repeat(self.batch, 1), logits.float().repeat(self.batch, 1))
        return scores[row : row + 1]


@dataclass(frozen=True)
class _Walk:
    path: list[int]
    tokens: list[int]
    log: float
    scores: list[Tensor]


def _tree(trees: Sequence[Tree], row: int) -> Tree:
    return trees[row if len(trees) > 1 else 0]
