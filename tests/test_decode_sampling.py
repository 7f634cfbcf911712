"""Sampling: the text of plain sampling from the same seed, and its law whatever is guessed."""

from __future__ import annotations

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
def test_7_the_law_of_four_tokens_is_the_enumerated_one(warpers: dict[str, Any]) -> None:
    """Five tokens, four drawn, in batches of sequences that accept unequally."""
    vocabulary, runs, batch = 5, *((80, 24) if "repetition_penalty" in warpers else (24, 256))
    model, call = (
        tiny_model("llama", "sdpa", vocabulary),
        {"do_sample": True, "top_k": 0, "temperature": 3.0, **warpers},
    )
    prompt = torch.tensor([[1, 4, 2]])
    law = _law(model, prompt, call)
    counts = dict.fromkeys(law, 0)
    torch.manual_seed(0)
    with attach_drafter(model, Random(Tree.dense([2, 2, 1]), vocabulary)) as handle:
        for _ in range(runs):
            drawn = model.generate(**_alike(prompt.repeat(batch, 1)), max_new_tokens=4, **call)
            for text in drawn[:, 3:].tolist():
                counts[tuple(text)] += 1  # a KeyError is a text of probability zero
    assert handle.counts.tokens_per_step > 1.2
    common = [text for text in law if law[text] * runs * batch >= 5]
    observed, expected = [counts[text] for text in common], [law[text] * runs * batch for text in common]
    if (rest := runs * batch - sum(expected)) >= 5:
        observed, expected = [*observed, runs * batch - sum(observed)], [*expected, rest]
    assert len(common) > 30
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [value * scale for value in expected]).pvalue > 1e-3


def _alike(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _law(model: Any, prompt: torch.Tensor, call: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every text of four tokens, by the scores of plain decoding after each shorter text."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        ids = torch.tensor([[*prompt[0].tolist(), *text] for text in law])
        out = plain(model, **_alike(ids), **call, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
        chances = out.scores[0].double().softmax(dim=-1).tolist()
        law = {
            (*text, token): so_far * chance
            for (text, so_far), after in zip(law.items(), chances, strict=True)
            for token, chance in enumerate(after)
            if chance > 0
        }
    assert sum(law.values()) == pytest.approx(1)
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
