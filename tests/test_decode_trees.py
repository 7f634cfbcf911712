"""Trees, their search, and the rules of acceptance by themselves."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from modules.decode_host import Exact, Tree, Typical, order_choices
from modules.decode_host.search import (
    accuracy,
    best_choices,
    draft_by_chance,
    expected_tokens,
    fastest,
    time_steps,
)
from modules.decode_host.tree import TreeTables
from tests.tiny_decode import TREES, Random, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_4_tables_say_what_the_parents_say(tree: Tree) -> None:
    tables = tree.tables(CPU)
    closure = torch.eye(len(tree), dtype=torch.bool)
    for node, parent in enumerate(tree.parents[1:], start=1):
        closure[node] |= closure[parent]
    assert torch.equal(tables.ancestors[0], closure)
    assert torch.equal(tables.ancestors[0].sum(dim=1) - 1, tables.depth[0])
    for node, path in enumerate(tree.paths):
        assert [tree.parents[n] for n in path] == [-1, *path[:-1]]
        assert tables.path[0, node].tolist() == [*path, *[node] * (tree.depth + 1 - len(path))]
        assert all(tree.parents[child] == node for child in tree.children[node])
    assert sum(map(len, tree.children)) == len(tree) - 1
    assert [tree.depths[n] for n in range(len(tree))] == sorted(tree.depths)


def test_trees_are_made_of_choices_chains_and_widths() -> None:
    choices = [(1,), (0, 2), (0,), (0, 0), (1, 0), (0,)]
    assert order_choices(choices) == ((0,), (1,), (0, 0), (0, 2), (1, 0))
    tree = Tree.from_choices(choices)
    assert tree.parents == (-1, 0, 0, 1, 1, 2)
    assert Tree.chain(2).parents == (-1, 0, 1)
    assert Tree.dense([2, 1]).parents == (-1, 0, 0, 1, 2)
    assert tree.prefix(3).parents == (-1, 0, 0) and tree.prefix(9) is tree and tree.prefix(0).parents == (-1,)
    assert tree.no_deeper(1).parents == (-1, 0, 0) and tree.no_deeper(0).parents == (-1,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tree(()), "node 0 is the root"),
        (lambda: Tree((0,)), "node 0 is the root"),
        (lambda: Tree((-1, 1)), "node 1 has parent 1"),
        (lambda: Tree((-1, 0, 1, 0)), "sort nodes by depth"),
        (lambda: Tree.from_choices([(0, 0)]), r"has no parent: add \(0,\)"),
        (lambda: Tree.from_choices([()]), "must be a tuple of ranks"),
        (lambda: Tree.from_choices([(-1,)]), "must be a tuple of ranks"),
    ],
)
def test_what_is_no_tree_is_refused_in_a_sentence(make, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def _random_table(rng: random.Random, heads: int, ranks: int) -> list[list[float]]:
    return [[rng.random() ** 2 for _ in range(ranks)] for _ in range(heads)]


@pytest.mark.parametrize("seed", range(30))
def test_11_the_search_finds_what_trying_all_trees_finds(seed: int) -> None:
    """Rows are not sorted.  Brute force over all ancestor-closed sets of up to N nodes."""
    rng = random.Random(seed)
    heads, ranks, nodes = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 6)
    table = _random_table(rng, heads, ranks)
    best = 0.0
    universe = [c for m in range(1, heads + 1) for c in itertools.product(range(ranks), repeat=m)]
    seen, front = {frozenset()}, [frozenset()]
    for _ in range(min(nodes, len(universe))):
        front = list(
            {
                chosen | {c}
                for chosen in front
                for c in universe
                if c not in chosen and (len(c) == 1 or c[:-1] in chosen)
            }
            - seen
        )
        seen.update(front)
    best = max(expected_tokens(table, list(chosen)) for chosen in front)
    found = best_choices(table, nodes)
    Tree.from_choices([choice for choice, _ in found])
    values = [value for _, value in found]
    assert len(found) == min(nodes, len(universe))
    assert values == sorted(values, reverse=True)
    assert 1 + sum(values) == pytest.approx(expected_tokens(table, [choice for choice, _ in found]))
    assert 1 + sum(values) == pytest.approx(best)


def test_11_accuracy_divides_each_head_by_its_own_count() -> None:
    assert accuracy([[8, 1], [3, 3]], [10, 6]) == [[0.8, 0.1], [0.5, 0.5]]


def test_the_tree_that_pays_depends_on_what_its_step_costs() -> None:
    tokens = [1.0, 1.5, 1.75, 1.875, 1.94]
    assert fastest(tokens, [1.0, 1.0, 1.0, 1.0, 1.0]) == 4
    assert fastest(tokens, [1.0, 2.0, 4.0, 6.0, 9.0]) == 0
    assert fastest(tokens, [1.0, 1.1, 1.2, 1.8, 3.0]) == 2
    assert fastest(tokens, [1.0, 1.4, 1.6, 1.7, 1.55]) == 4  # as kernels are: whole fours cost little more


def test_of_trees_that_timing_does_not_tell_apart_the_one_with_most_tokens_is_drafted() -> None:
    assert fastest([2.0, 2.5, 3.0], [1.0, 1.25, 1.53]) == 2
    assert fastest([2.0, 2.5, 3.0], [1.0, 1.25, 1.60]) == 1


@pytest.mark.parametrize("drafter", [None, Random(Tree.chain(3))], ids=["host", "with_drafter"])
def test_steps_are_timed_and_leave_nothing(drafter) -> None:
    model = tiny_model()
    before = sorted(vars(model))
    seconds = time_steps(model, [1, 4, 16], context=20, repeats=2, drafter=drafter)
    assert list(seconds) == [1, 4, 16] and all(value > 0 for value in seconds.values())
    assert sorted(vars(model)) == before and not model.get_output_embeddings()._forward_pre_hooks


def test_a_tree_for_this_step_takes_the_surest_guesses() -> None:
    tokens = torch.tensor([[[7, 8, 9], [4, 5, 6]], [[1, 2, 3], [1, 2, 3]]])
    chances = torch.tensor([[[0.9, 0.05, 0.01], [0.6, 0.3, 0.02]], [[0.3, 0.29, 0.28], [0.1, 0.1, 0.1]]])
    draft = draft_by_chance(tokens, chances, 3)
    assert draft.tree_of(0).parents == (-1, 0, 1, 1) and draft.tokens[0].tolist() == [7, 4, 5]
    assert draft.tree_of(1).parents == (-1, 0, 0, 0) and draft.tokens[1].tolist() == [1, 2, 3]
    assert draft.chance is not None and draft.chance[0] == pytest.approx([0.9, 0.54, 0.27])


def _keep(rule, scores, tokens, tree: Tree) -> tuple[int, int]:
    last, token = rule.keep(scores[None], torch.tensor([tokens]), tree.tables(CPU))
    walked = 0, 0
    node, depth = 0, 0
    while True:  # the same, node by node; only its first path of several that are equally long
        children = tree.children[node]
        kept, following = rule.keep_one(scores[node : node + 1], 0, depth, [tokens[child] for child in children])
        walked = node, following
        if len(kept) != 1:
            break
        node, depth = children[next(iter(kept))], depth + 1
    if not kept:
        assert walked == (int(last), int(token))
    return int(last), int(token)


def test_greedy_keeps_the_path_that_its_best_tokens_spell() -> None:
    tree = Tree.dense([2, 2])
    scores = torch.eye(8)[[3, 5, 6, 1, 2, 7, 4]]  # after each node: its best token
    assert _keep(Exact(), scores, [0, 3, 4, 5, 6, 5, 6], tree) == (3, 1)
    assert _keep(Exact(), scores, [0, 4, 3, 5, 5, 5, 6], tree) == (6, 4)
    assert _keep(Exact(), scores, [0, 3, 4, 0, 0, 6, 6], tree) == (1, 5)
    assert _keep(Exact(), scores, [0, -1, -1, 5, 6, 6, 6], tree) == (0, 3)
    # Of two siblings with the right token the one that goes on counts.
    last, token = Exact().keep(scores[None], torch.tensor([[0, 3, 3, 0, 0, 0, 6]]), tree.tables(CPU))
    assert (int(last), int(token)) == (6, 4)


def test_7_typical_acceptance_is_greedy_when_cold_and_takes_all_when_hot() -> None:
    torch.manual_seed(0)
    tree, vocabulary = Tree.dense([3, 2]), 16  # more tokens than 1 / epsilon = 11.1
    scores = torch.randn(len(tree), vocabulary)
    for _ in range(20):
        tokens = [0, *torch.randint(0, vocabulary, (len(tree) - 1,)).tolist()]
        cold = scores / 1e-3
        assert _keep(Typical(), cold, tokens, tree) == _keep(Exact(), cold, tokens, tree)
        hot = torch.zeros_like(scores)
        assert tree.depths[_keep(Typical(delta=0.3), hot, tokens, tree)[0]] == 2
        assert tree.depths[_keep(Typical(delta=0.999), hot, tokens, tree)[0]] == 2
        assert _keep(Typical(delta=1.0), hot, tokens, tree)[0] == 0  # 1/V is not more than 1/V
    # Fewer tokens than 1 / epsilon: epsilon decides.
    assert _keep(Typical(delta=5.0), torch.zeros(len(tree), 8), [0] * len(tree), tree)[0] != 0


def test_7_typical_acceptance_measures_entropy_in_nats_and_lets_equality_fail() -> None:
    chance = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    nats = 1.75 * math.log(2)
    assert Typical(epsilon=1.0, delta=1.0).threshold(chance).item() == pytest.approx(math.exp(-nats), rel=1e-5)
    tree, tokens = Tree.chain(1), [0, 1]
    scores = chance.log().expand(2, -1)
    assert _keep(Typical(epsilon=0.25, delta=9.0), scores, tokens, tree)[0] == 0
    assert _keep(Typical(epsilon=0.2499, delta=9.0), scores, tokens, tree)[0] == 1


def test_7_the_longest_path_wins_then_the_most_probable() -> None:
    rule = Typical(epsilon=0.05, delta=9.0)
    tree = Tree.from_choices([(0,), (1,), (1, 0), (1, 1), (1, 2)])
    after_root = torch.tensor([0.6, 0.2, 0.1, 0.1])
    below = torch.tensor([0.04, 0.3, 0.56, 0.1])
    scores = torch.stack([after_root, below, below, below, below, below]).log()
    assert _keep(rule, scores, [9, 0, 1, 3, 1, 0], tree) == (4, 2)
    assert _keep(rule, scores, [9, 0, 1, 3, 0, 0], tree) == (3, 2)
    assert _keep(rule, scores, [9, 0, 1, 0, 0, 0], tree) == (1, 2)  # of two of length one the more probable


def test_trees_of_unequal_shape_are_judged_side_by_side() -> None:
    trees = [Tree.chain(3), Tree.from_choices([(0,), (1,), (1, 0)])]
    tables = TreeTables.of(trees, CPU)
    scores = torch.eye(6)[torch.tensor([[1, 2, 3, 4], [2, 5, 3, 4]])]
    last, token = Exact().keep(scores, torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), tables)
    assert last.tolist() == [3, 3] and token.tolist() == [4, 4]
