"""Sampling: the text of plain sampling from the same seed, and its law whatever is guessed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from modules.decode_host import Tree, Typical, attach_drafter
from tests.tiny_decode import TREES, Knowing, Ragged, Random, plain, prompts, texts, tiny_model

SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "top_k": 0}
WARPERS: dict[str, dict[str, Any]] = {
    "bare": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5, "temperature": 1.3},
}


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("tree", ["chain", "dense", "wide"])
def test_a_single_text_is_that_of_plain_sampling_from_the_same_seed(name: str, tree: str) -> None:
    model, inputs = tiny_model(), prompts(1)
    call = {**inputs, **SAMPLED, **WARPERS[name]}
    taken = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        want = plain(model, **call)
        for drafter in (Random(TREES[tree]), Knowing(TREES[tree], texts(inputs, want))):
            with attach_drafter(model, drafter) as handle:
                torch.manual_seed(seed)
                assert torch.equal(model.generate(**call), want)
            taken = max(taken, handle.counts.tokens_per_step)
    assert taken > 1.8


def test_a_batch_that_grows_evenly_is_plain_sampling_too() -> None:
    model, inputs = tiny_model(), prompts(3)
    torch.manual_seed(0)
    want = plain(model, **inputs, **SAMPLED)
    with attach_drafter(model, Knowing(Tree.chain(2), texts(inputs, want))) as handle:
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **SAMPLED), want)
    assert handle.counts.tokens_per_step > 2.5


@pytest.mark.parametrize("warpers", [{}, {"top_p": 0.7}, {"repetition_penalty": 1.4}], ids=["bare", "top_p", "penalty"])
def test_7_the_law_of_three_tokens_is_the_enumerated_one(warpers: dict[str, Any]) -> None:
    """Eight tokens, 3 drawn, in batches of sequences that accept unequally."""
    warpers = warpers | {"temperature": 3.0}
    vocabulary, runs, batch = 8, *((60, 24) if "repetition_penalty" in warpers else (24, 256))
    model = tiny_model("llama", "sdpa", vocabulary)
    prompt = torch.tensor([[1, 5, 2]])
    law = _enumerate(model, prompt, vocabulary, warpers)
    inputs = {"input_ids": prompt.repeat(batch, 1), "attention_mask": torch.ones(batch, 3, dtype=torch.long)}
    counts: dict[tuple[int, ...], int] = dict.fromkeys(law, 0)
    torch.manual_seed(0)
    with attach_drafter(model, Random(Tree.dense([3, 2]), vocabulary)) as handle:
        for _ in range(runs):
            drawn = model.generate(**inputs, do_sample=True, max_new_tokens=3, top_k=0, **warpers)
            for text in drawn[:, 3:].tolist():
                counts[tuple(text)] += 1  # a KeyError is a text of probability zero
    assert handle.counts.tokens_per_step > 1.1
    total = sum(counts.values())
    common = [text for text in law if law[text] * total >= 5]
    observed = [counts[text] for text in common]
    expected = [law[text] * total for text in common]
    rest = total - sum(observed), max(total - sum(expected), 0.0)
    if rest[1] >= 5:
        observed.append(rest[0])
        expected.append(rest[1])
    scale = sum(observed) / sum(expected)
    assert len(common) > 20
    assert chisquare(observed, [value * scale for value in expected]).pvalue > 1e-4


def _enumerate(
    model: Any, prompt: torch.Tensor, vocabulary: int, warpers: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """Probability of every text of three tokens, by plain one-token calls with scores."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, chance in law.items():
            ids = torch.cat([prompt, torch.tensor([text], dtype=torch.long)], dim=1)
            out = plain(
                model,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=1,
                top_k=0,
                return_dict_in_generate=True,
                output_scores=True,
                **warpers,
            )
            each = out.scores[0][0].double().softmax(dim=-1).tolist()
            longer |= {(*text, token): chance * each[token] for token in range(vocabulary) if each[token] > 0}
        law = longer
    assert abs(sum(law.values()) - 1) < 1e-6 and len(law) <= vocabulary**3
    assert all(len(text) == 3 for text in itertools.islice(law, 5))
    return law


@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.2}], ids=["all_at_once", "by_path"])
@pytest.mark.parametrize("batch", [1, 3])
def test_7_typical_acceptance_is_an_option_of_sampling(penalty: dict[str, Any], batch: int) -> None:
    model, inputs = tiny_model(), prompts(batch)
    greedy = plain(model, **inputs, do_sample=False, max_new_tokens=20, **penalty)
    known = texts(inputs, greedy)
    with attach_drafter(model, Knowing(TREES["dense"], known), Typical()) as handle:
        # Not sampling: exact, as always.
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20, **penalty), greedy)
        # Cold: greedy.  It draws nothing.
        state = torch.random.get_rng_state()
        assert torch.equal(model.generate(**inputs, **SAMPLED, temperature=1e-3, **penalty), greedy)
        assert torch.equal(torch.random.get_rng_state(), state)
        handle.counts.reset()
    with attach_drafter(model, Random(TREES["dense"]), Typical(epsilon=0.09, delta=0.3)) as handle:
        # Hot: 40 tokens are more than 1 / epsilon, so whatever is guessed is taken.
        hot = model.generate(**inputs, **SAMPLED, temperature=1e4, **penalty)
        assert not torch.equal(hot, greedy) and handle.counts.tokens_per_step > 3.2
    with attach_drafter(model, Random(TREES["dense"]), Typical(epsilon=0.09, delta=1.01)) as handle:
        model.generate(**inputs, **SAMPLED, temperature=1e6, **penalty)
        assert handle.counts.tokens_per_step == 1


def test_sampling_a_ragged_batch_ends_where_it_must() -> None:
    model, inputs = tiny_model(), prompts(4)
    free = plain(model, **inputs, do_sample=False, max_new_tokens=20)
    with attach_drafter(model, Ragged(texts(inputs, free))) as handle:
        torch.manual_seed(1)
        got = model.generate(**inputs, **SAMPLED, temperature=0.3, eos_token_id=26, pad_token_id=1)
    assert handle.counts.tokens_per_step > 1
    for row in got[:, 9:].tolist():
        end = row.index(26) if 26 in row else len(row)
        assert 26 not in row[:end] and set(row[end + 1 :]) <= {1}
