"""The untrained drafters: what they guess, what they learn of themselves, and two of them in one tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, Tree, attach_drafter
from modules.decode_host.merge import Branches, pack
from modules.hybrid import Hybrid
from modules.prompt_lookup import PromptLookup
from modules.trie_lookahead import Trie, TrieLookahead
from tests.tiny_decode import TREES, Knowing, Random, plain, prompts, texts, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}


def state(*rows: list[int], room: int = 99, active: Sequence[bool] | None = None) -> DraftState:
    root = torch.tensor([row[-1] for row in rows])
    return DraftState(rows, root, None, active or [True] * len(rows), room)


def paths(draft: Draft, row: int = 0) -> set[tuple[int, ...]]:
    """The guessed texts, nodes without a guess left out."""
    tree, tokens = draft.tree_of(row), [0, *draft.tokens[row].tolist()]
    spelled = [tuple(tokens[node] for node in path[1:]) for path in tree.paths]
    return {path for path in spelled if path and min(path) >= 0}


def begun(drafter: Drafter, *rows: list[int]) -> Drafter:
    drafter.begin(rows)
    return drafter


MEMBERS = {
    "lookup": lambda: PromptLookup(),
    "trie": lambda: TrieLookahead(),
    "lookup_and_trie": lambda: Hybrid(PromptLookup(), TrieLookahead(), nodes=12),
    "lookup_and_random": lambda: Hybrid(PromptLookup(), Random(TREES["dense"]), nodes=9),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_1_and_13_their_text_is_that_of_plain_decoding(name: str, batch: int) -> None:
    """On prompts that repeat themselves, twice over, so that what was kept of the first request is used."""
    model, drafter = tiny_model(), MEMBERS[name]()
    inputs = {key: torch.cat([value, value, value], dim=1) for key, value in prompts(batch).items()}
    if batch > 1:
        inputs = prompts(batch, length=30)
    with attach_drafter(model, drafter) as handle:
        for more in ({}, {"eos_token_id": 26, "pad_token_id": 1}, {"cache_implementation": "static"}):
            want = plain(model, **inputs, **GREEDY, **more)
            assert torch.equal(model.generate(**inputs, **GREEDY, **more), want)
    assert handle.memory_bytes() > 0
    # The same request again: an answer that was seen is looked up by those who keep it.
    if "trie" in name:
        assert handle.counts.tokens_per_step > 1.5


def test_lookup_continues_the_last_occurrence_of_the_longest_ngram() -> None:
    drafter = PromptLookup(length=3, longest=2)
    text = [1, 2, 9, 1, 2, 8, 7, 6, 2, 5, 5, 1, 2]
    assert paths(begun(drafter, text).propose(state(text))) == {(8,), (8, 7), (8, 7, 6)}
    text = [1, 2, 9, 1, 2, 8, 7, 6, 2, 5, 5, 4, 2]  # (4, 2) is new, 2 is not
    assert paths(begun(drafter, text).propose(state(text))) == {(5,), (5, 5), (5, 5, 4)}
    text = [1, 2, 3]
    draft = begun(drafter, text).propose(state(text))
    assert len(draft.tree_of(0)) == 1 and draft.tokens.shape == (1, 0)
    drafter.begin([[1, 2, 3]])  # what another request said is forgotten
    assert len(drafter.propose(state([3, 1, 2])).tree_of(0)) == 1


def test_lookup_goes_round_where_a_repetition_reaches_the_end() -> None:
    drafter = PromptLookup(length=5)
    text = [9, 4, 5, 4, 5]
    assert (4, 5, 4, 5, 4) in paths(begun(drafter, text).propose(state(text)))
    text = [7, 7]
    assert (7,) * 5 in paths(begun(drafter, text).propose(state(text)))


def test_lookup_of_a_batch_leaves_out_who_has_nothing_or_has_ended() -> None:
    drafter, rows = PromptLookup(length=2), ([1, 2, 1], [1, 2, 3], [4, 4, 4])
    draft = begun(drafter, *rows).propose(state(*rows, active=[True, True, False]))
    assert draft.tokens.tolist() == [[2, 1], [-1, -1], [-1, -1]]
    assert begun(drafter, *rows).propose(state(*rows, room=1)).tokens.shape == (3, 0)
    assert begun(drafter, *rows).propose(state(*rows, room=2)).tokens.shape == (3, 1)


def test_lookup_learns_how_often_it_is_right() -> None:
    drafter = PromptLookup(length=2, longest=1)
    row = [1, 2, 3]
    drafter.begin([row])
    fresh = drafter.chances(1)
    assert fresh == [0.5, 0.25]
    for i in range(40):  # its first guess is right, its second wrong
        row += [1]
        drafter.propose(state(row))
        row += [2, 10 + i]
        drafter.propose(state(row))
        row += [5, 2, 3]
    first, second = drafter.chances(1)
    assert first > 0.8 and second < 0.1
    chances = drafter.propose(state([*row, 1])).chance
    assert chances is not None and list(chances[0]) == [first, second]


def test_trie_branches_and_prefers_what_is_frequent() -> None:
    drafter = TrieLookahead(nodes=4)
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 9, 1, 2]
    draft = begun(drafter, text).propose(state(text))
    found = paths(draft)
    assert {(3,), (4,)} < found and len(found) == 4
    chance = dict(zip([tuple(draft.tokens[0][[n - 1 for n in p[1:]]].tolist()) for p in draft.tree_of(0).paths[1:]],
                      draft.chance[0], strict=True))  # fmt: skip
    assert chance[(3,)] > chance[(4,)] > 0
    one = begun(TrieLookahead(nodes=1), text).propose(state(text))
    assert paths(one) == {(3,)}
    assert paths(begun(TrieLookahead(nodes=1), [1, 2, 3]).propose(state([1, 2, 3]))) == set()


def test_trie_falls_back_to_the_last_token() -> None:
    text = [5, 2, 3, 9, 1, 2]  # (1, 2) went on nowhere, 2 went on to 3
    assert (3, 9) in paths(begun(TrieLookahead(), text).propose(state(text)))


def test_trie_remembers_answers_across_requests_but_no_prompts() -> None:
    drafter = TrieLookahead(nodes=4)
    drafter.begin([[1, 2, 3]])
    drafter.end([[1, 2, 3, 4, 5, 6]])
    drafter.begin([[9, 3, 4]])
    assert paths(drafter.propose(state([9, 3, 4]))) == {(5,), (5, 6)}
    drafter.begin([[9, 1]])
    assert paths(drafter.propose(state([9, 1]))) == set()
    # The request's own continuation comes first, however often the other one was seen.
    for _ in range(50):
        drafter.begin([[3]])
        drafter.end([[3, 4, 5, 6]])
    own = [3, 4, 8, 7, 3, 4]
    drafter.nodes = 1
    assert paths(begun(drafter, own).propose(state(own))) == {(8,)}


def test_trie_is_read_once_however_it_is_cut() -> None:
    text = [1, 2, 1, 2, 3, 1, 2, 1, 3, 3, 1, 2, 2]
    whole, pieces = Trie(3, 999), Trie(3, 999)
    whole.read(text)
    for end in range(1, len(text) + 1):
        pieces.read(text[:end])

    def dump(node: Any) -> Any:
        return node.count, {token: dump(child) for token, child in sorted(node.children.items())}

    assert dump(whole.root) == dump(pieces.root)
    for key in ([1, 2], [1, 2, 1], [3], [2, 2], [9]):
        count = sum(text[i : i + len(key)] == key for i in range(len(text)))
        node = whole.find(key)
        assert (0 if node is None else node.count) == count


def test_trie_over_its_limit_keeps_what_is_frequent() -> None:
    trie = Trie(2, 60)
    trie.read([1, 2, 3] * 20 + list(range(100, 160)))
    assert trie.size <= 60
    assert trie.find([1, 2, 3]) is not None and trie.find([120]) is None
    assert trie.find([1, 2]).count == 10
    trie.read([1, 2, 3] * 20 + list(range(100, 160)) + [1, 2])
    assert trie.find([1, 2]).count == 11


class Fixed(Drafter):
    """Says the same every time."""

    def __init__(self, tree: Tree, tokens: list[int], chance: list[float] | None, needs_hidden: bool = False) -> None:
        self.draft = Draft(tree, torch.tensor([tokens]), None if chance is None else [chance])
        self.needs_hidden = needs_hidden
        self.heard: list[str] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        self.heard.append("begin")

    def propose(self, state: DraftState) -> Draft:
        return self.draft

    def end(self, rows: Sequence[Sequence[int]]) -> None:
        self.heard.append("end")

    def memory_bytes(self) -> int:
        return 7


def test_hybrid_holds_every_path_once_and_the_most_probable_nodes() -> None:
    one = Fixed(Tree.dense([2, 1]), [1, 2, 3, 4], [0.6, 0.2, 0.3, 0.1])
    other = Fixed(Tree.chain(3), [1, 3, 5], [0.5, 0.4, 0.35], needs_hidden=True)
    hybrid = Hybrid(one, other, nodes=9)
    draft = hybrid.propose(state([0]))
    assert paths(draft) == {(1,), (2,), (1, 3), (2, 4), (1, 3, 5)} and len(draft.tree_of(0)) == 6
    assert paths(Hybrid(one, other, nodes=3).propose(state([0]))) == {(1,), (1, 3), (1, 3, 5)}
    assert paths(Hybrid(one, other, nodes=4).propose(state([0]))) == {(1,), (2,), (1, 3), (1, 3, 5)}
    doubtful = Fixed(Tree.chain(3), [1, 3, 5], [0.15, 0.12, 0.11])  # of two opinions the better one counts
    assert paths(Hybrid(one, doubtful, nodes=2).propose(state([0]))) == {(1,), (1, 3)}
    assert hybrid.needs_hidden and hybrid.memory_bytes() == 14 and hybrid.hidden_layers == ()
    other.hidden_layers = (2, 4)
    assert Hybrid(one, other).hidden_layers == (2, 4)
    one.needs_hidden = True
    with pytest.raises(ValueError, match=r"read layers \[\(\), \(2, 4\)\]"):
        Hybrid(one, other)
    hybrid.begin([[1]])
    hybrid.end([[1, 2]])
    assert one.heard == other.heard == ["begin", "end"]
    assert paths(Hybrid(Fixed(Tree.chain(2), [8, -1], None), one, nodes=2).propose(state([0]))) == {(1,), (8,)}


def test_hybrid_accepts_what_either_knows() -> None:
    """One knows the first half of the text, the other the second."""
    model, inputs = tiny_model(), prompts(1)
    want = plain(model, **inputs, **GREEDY)
    known = texts(inputs, want)[0]
    first, second = [*known[:29], *[0] * 30], [*[0] * 29, *known[29:]]
    steps = []
    for drafter in (
        Knowing(Tree.chain(3), [first]),
        Knowing(Tree.chain(3), [second]),
        Hybrid(Knowing(Tree.chain(3), [first]), Knowing(Tree.chain(3), [second]), nodes=6),
    ):
        with attach_drafter(model, drafter) as handle:
            assert torch.equal(model.generate(**inputs, **GREEDY), want)
        steps.append(handle.counts.tokens_per_step)
    assert steps[2] > 1.4 * max(steps[:2]) and steps[2] > 3.5


def test_sequences_of_unequal_guesses_are_packed_side_by_side() -> None:
    rows = [Branches(), Branches(), Branches()]
    rows[0].add((4,), 0.5)
    rows[0].add((4, 5), 0.9)  # no more probable than its parent
    rows[1].add((6,), 0.1)
    draft = pack(rows, 8)
    assert draft.tokens.tolist() == [[4, 5], [6, -1], [-1, -1]]
    assert [tree.parents for tree in draft.tree] == [(-1, 0, 1), (-1, 0, 0), (-1, 0, 0)]
    assert draft.chance == [[0.5, 0.5], [0.1, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "make", [lambda: PromptLookup(0), lambda: TrieLookahead(nodes=0), lambda: Hybrid(None, None, 0)]
)
def test_settings_that_draft_nothing_are_refused_in_a_sentence(make: Any) -> None:
    with pytest.raises(ValueError, match="1 or more") as caught:
        make()
    assert "\n" not in str(caught.value)
