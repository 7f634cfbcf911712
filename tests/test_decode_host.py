"""Drafted decoding gives the text of plain decoding, whatever is guessed, and counts what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

from modules.decode_host import attach_drafter
from modules.decode_host.backbone import stepping
from tests.tiny_decode import (
    CONFIGS,
    GREEDY,
    NEW,
    TREES,
    Knowing,
    Ragged,
    Random,
    both,
    plain,
    prompts,
    texts,
    tiny_model,
)

PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[28], [27, 36]]},
    "suppressed": {"suppress_tokens": [3, 7, 26]},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[28]], "min_new_tokens": 9},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tree", TREES)
def test_1_greedy_text_is_that_of_plain_decoding(kind: str, tree: str) -> None:
    model, inputs = tiny_model(kind), prompts(1)
    want, got, counts = both(model, Random(TREES[tree]), **inputs, **GREEDY)
    assert torch.equal(got, want)
    assert counts.generations == 1 and counts.tokens == NEW - 1
    for right, twins in ((99, False), (1, False), (0, False), (99, True)):
        knowing = Knowing(TREES[tree], texts(inputs, want), right, twins)
        assert torch.equal(both(model, knowing, **inputs, **GREEDY)[1], want)


@pytest.mark.parametrize("kind", ["llama_dynamic", "llama_long"])
def test_1_no_guess_changes_the_rotation_of_other_tokens(kind: str) -> None:
    """Rotary embeddings that change with the text's length, here at 20 tokens, do so when plain decoding does."""
    model, inputs = tiny_model(kind), prompts(1)
    want, got, counts = both(model, Random(TREES["dense"]), **inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    for mine, its in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys, atol=1e-4, rtol=1e-4)
    assert counts.nodes > counts.steps


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "qwen2_sliding"])
def test_12_attention_and_caches_do_not_change_the_text(attention: str, cache: str, kind: str) -> None:
    if (kind, cache) == ("qwen2_sliding", "static"):
        pytest.skip("refused, see test_what_cannot_be_drafted_is_refused_in_a_sentence")
    model, inputs = tiny_model(kind, attention), prompts(1)
    call = {**inputs, **GREEDY} | ({"cache_implementation": "static"} if cache == "static" else {})
    want = plain(model, **inputs, **GREEDY)
    for drafter in (Random(TREES["dense"]), Knowing(TREES["dense"], texts(inputs, want)), Random(TREES["sixty_four"])):
        _, got, counts = both(model, drafter, **call)
        assert torch.equal(got, want)
    assert counts.nodes > counts.steps  # the trees were not cut away


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("batch", [1, 3])
def test_processors_see_the_context_and_the_nodes_own_path(name: str, batch: int) -> None:
    model, inputs = tiny_model(), prompts(batch)
    call = {**inputs, **GREEDY, **PROCESSORS[name]}
    bare = plain(model, **inputs, **GREEDY)
    want = plain(model, **call)
    assert not torch.equal(want, bare)
    for drafter in (Random(TREES["dense"]), Knowing(TREES["dense"], texts(inputs, want))):
        with attach_drafter(model, drafter) as handle:
            assert torch.equal(model.generate(**call), want)
    assert handle.counts.tokens_per_step > 2


@pytest.mark.parametrize("kind", ["llama", "mistral_sliding", "qwen2_sliding", "phi"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_13_a_batch_is_its_single_runs(kind: str, cache: str) -> None:
    """Left padding, unequal acceptance; the padding changes no position."""
    if "sliding" in kind and cache == "static":
        pytest.skip("refused, see test_what_cannot_be_drafted_is_refused_in_a_sentence")
    model, inputs = tiny_model(kind), prompts(4)
    more = {"cache_implementation": "static"} if cache == "static" else {}
    want = plain(model, **inputs, **GREEDY)
    known = texts(inputs, want)
    for drafter in (Random(TREES["dense"]), Knowing(TREES["dense"], known), Ragged(known)):
        _, got, counts = both(model, drafter, **inputs, **GREEDY, **more)
        assert torch.equal(got, want)
        assert counts.sequence_steps <= 4 * counts.steps and counts.tokens == 4 * (NEW - 1)
    # Ragged knows every other sequence better, so they end at different steps.
    assert counts.sequence_steps < 4 * counts.steps
    for row, text in enumerate(known):
        single = {"input_ids": inputs["input_ids"][row : row + 1, -len(text) + NEW :]}
        got = both(model, Random(TREES["wide"]), **single, **GREEDY)[1]
        assert got[0].tolist() == text


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.2}], ids=["bare", "penalty"])
def test_1_end_tokens_count_inside_a_chunk(batch: int, processors: dict[str, Any]) -> None:
    model, inputs = tiny_model(), prompts(batch)
    free = plain(model, **inputs, **GREEDY, **processors)
    ended = 0
    for at in range(NEW):
        end = {"eos_token_id": [int(free[0, 9 + at]), int(free[-1, 9 + (at + 5) % NEW])], "pad_token_id": 1}
        call = {**inputs, **GREEDY, **processors, **end}
        want = plain(model, **call)
        knowing = Knowing(TREES["chain"], texts(inputs, free))
        _, got, counts = both(model, knowing, **call)
        assert torch.equal(got, want)
        ended += want.shape[1] < free.shape[1] and counts.steps > 0
    assert ended


@pytest.mark.parametrize("limit", range(1, 9))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_1_limits_count_inside_a_chunk(limit: int, cache: str) -> None:
    model, inputs = tiny_model(), prompts(1)
    known = texts(inputs, plain(model, **inputs, **GREEDY))
    call = {**inputs, "do_sample": False, "max_new_tokens": limit}
    more = {"cache_implementation": "static"} if cache == "static" else {}
    want, got, counts = both(model, Knowing(TREES["dense"], known), **call, **more)
    assert torch.equal(got, want) and got.shape[1] == 9 + limit
    assert counts.tokens == limit - 1


@pytest.mark.parametrize("batch", [1, 4])
def test_learned_positions_are_never_left(batch: int) -> None:
    """Up to the last position that there is, while other sequences still draft deeply."""
    model, inputs = tiny_model("gpt2"), prompts(batch)
    known = texts(inputs, plain(model, **inputs, **GREEDY))
    for drafter in (Ragged(known), Knowing(TREES["chain"], known), Random(TREES["dense"])):
        want, got, counts = both(model, drafter, **inputs, **GREEDY)
        assert torch.equal(got, want) and got.shape[1] == model.config.n_positions
    assert counts.steps


@pytest.mark.parametrize("tree", TREES)
def test_2_and_6_tokens_per_step_are_counted(tree: str) -> None:
    model, inputs = tiny_model(), prompts(1)
    depth = TREES[tree].depth
    length = 1 + 4 * (depth + 1)  # the prefill's token and four full steps
    call = {**inputs, "do_sample": False, "max_new_tokens": length}
    known = texts(inputs, plain(model, **call))
    _, _, counts = both(model, Knowing(TREES[tree], known), **call)
    assert counts.tokens_per_step == depth + 1 and counts.steps == 4
    assert counts.accepted == {depth: 4} and counts.nodes <= 4 * len(TREES[tree])
    _, _, counts = both(model, Knowing(TREES[tree], known, right=0), **call)
    assert counts.tokens_per_step == 1 and counts.accepted == {0: length - 1}
    counts.reset()
    assert (counts.steps, counts.tokens, counts.tokens_per_step) == (0, 0, 1.0)


def test_backbone_calls_are_those_that_are_counted() -> None:
    model, inputs = tiny_model(), prompts(2)
    known = texts(inputs, plain(model, **inputs, **GREEDY))
    calls: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with attach_drafter(model, Knowing(TREES["chain"], known)) as handle:
            model.generate(**inputs, **GREEDY)
    finally:
        hook.remove()
    assert len(calls) == 1 + handle.counts.steps and calls[0] == 9 and max(calls[1:]) == 5


def test_conversations_go_on_from_their_cache() -> None:
    model, inputs = tiny_model(), prompts(1)
    known = texts(inputs, plain(model, **inputs, do_sample=False, max_new_tokens=2 * NEW))
    with attach_drafter(model, Knowing(TREES["dense"], known)):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == 9 + NEW - 1
        everything = model.generate(first.sequences, **GREEDY, past_key_values=cache)
    assert everything[0].tolist() == known[0]
    for empty in (DynamicCache(), StaticCache(config=model.config, max_cache_len=100)):
        with attach_drafter(model, Knowing(TREES["dense"], known)):
            assert model.generate(**inputs, **GREEDY, past_key_values=empty)[0].tolist() == known[0][: 9 + NEW]
        assert int(empty.get_seq_length()) == 9 + NEW - 1


def test_only_the_new_ids_of_a_conversation_may_be_given() -> None:
    model, inputs = tiny_model(), prompts(1)
    start, more = inputs["input_ids"], prompts(1, length=4, seed=5)["input_ids"]
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        with torch.no_grad():
            model(start, past_key_values=cache)
    call = {"attention_mask": torch.ones(1, 13, dtype=torch.long), **GREEDY}
    want = plain(model, input_ids=more, past_key_values=caches[0], **call)
    with attach_drafter(model, Random(TREES["dense"])):
        assert torch.equal(model.generate(more, past_key_values=caches[1], **call), want)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.5}], ids=["bare", "penalty"])
def test_scores_and_logits_are_those_of_plain_decoding(batch: int, processors: dict[str, Any]) -> None:
    model, inputs = tiny_model(), prompts(batch)
    call = {
        **inputs,
        **GREEDY,
        **processors,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    want = plain(model, **call)
    with attach_drafter(model, Knowing(TREES["dense"], texts(inputs, want.sequences))):
        got = model.generate(**call)
    assert type(got) is type(want) and torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(got[name]), torch.stack(want[name]), atol=1e-4, rtol=1e-4)


def test_with_several_processes_steps_make_tensors_that_training_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    weight = torch.ones(2, requires_grad=True)
    with stepping():
        made = weight * 2
    assert not made.is_inference() and not made.requires_grad
