"""Drafted decoding gives the text of plain decoding, whatever is guessed, and counts what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from modules.decode_host import Draft, DraftedDecoding, Tree, attach_drafter
from tests.tiny_decode import CONFIGS, TREES, VOCABULARY, Knowing, Ragged, Random, plain, prompts, texts, tiny_model

NEW = 24
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[28], [27, 36]]},
    "suppressed": {"suppress_tokens": [3, 7, 26]},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[28]], "min_new_tokens": 9},
}


def both(model: Any, drafter: Any, **call: Any) -> tuple[Any, Any, Any]:
    """Plain and drafted decoding of the same call, and what the handle counted."""
    want = plain(model, **call)
    with attach_drafter(model, drafter) as handle:
        got = model.generate(**call)
    return want, got, handle.counts


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


@pytest.mark.slow
def test_12_flex_attention_gives_the_same_text() -> None:
    model, inputs = tiny_model("llama", "flex_attention"), prompts(2)
    want = plain(tiny_model(), **inputs, **GREEDY)
    with attach_drafter(model, Knowing(TREES["dense"], texts(inputs, want))) as handle:
        assert torch.equal(model.generate(**inputs, **GREEDY), want)
    assert handle.counts.tokens_per_step > 2


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


class Collected(BaseStreamer):
    """What a streamer is handed, and when it ends."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.ids.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("batch", [1, 3])
def test_streaming_gives_the_same_text_token_by_token(batch: int) -> None:
    model, inputs = tiny_model(), prompts(batch)
    free = plain(model, **inputs, **GREEDY)
    call = {**inputs, **GREEDY, "eos_token_id": [int(free[0, 20])], "pad_token_id": 1}
    streams = Collected(), Collected()
    want = plain(model, **call, streamer=streams[0])
    with attach_drafter(model, Ragged(texts(inputs, free))):
        got = model.generate(**call, streamer=streams[1])
    assert torch.equal(got, want)
    assert streams[0].ended == streams[1].ended == 1
    assert all(map(torch.equal, *(stream.ids for stream in streams)))
    assert len(streams[0].ids) == len(streams[1].ids)


class Until(StoppingCriteria):
    """Ends a sequence at the first two tokens that add up to less than 40."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -2:].sum(dim=1) < 40


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [None, [39]], ids=["no_end_token", "end_token"])
def test_criteria_of_the_user_are_asked_after_every_token(batch: int, eos: Any) -> None:
    model, inputs = tiny_model(), prompts(batch)
    free = plain(model, **inputs, **GREEDY)
    call = {
        **inputs,
        **GREEDY,
        "stopping_criteria": StoppingCriteriaList([Until()]),
        "eos_token_id": eos,
        "pad_token_id": 1,
    }
    want = plain(model, **call)
    assert want.shape[1] < free.shape[1]
    for drafter in (Knowing(TREES["chain"], texts(inputs, free)), Ragged(texts(inputs, free))):
        assert torch.equal(both(model, drafter, **call)[1], want)


class Words:
    """Stands in for a tokenizer of one letter per id, as far as stop strings look at one."""

    def __init__(self) -> None:
        self.letters = [chr(ord("A") + i) for i in range(VOCABULARY)]

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)}

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.index(letter) for letter in text]}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(self.letters[i] for i in ids)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]


def test_stop_strings_stop() -> None:
    model, inputs, words = tiny_model(), prompts(1), Words()
    free = plain(model, **inputs, **GREEDY)
    stop = words.decode(free[0, 15:17].tolist())
    for call in ({"stop_strings": [stop]}, {"generation_config": GenerationConfig(stop_strings=[stop], **GREEDY)}):
        everything = {**inputs, "tokenizer": words, **({} if "generation_config" in call else GREEDY), **call}
        want, got, _ = both(model, Knowing(TREES["chain"], texts(inputs, free)), **everything)
        assert torch.equal(got, want) and want.shape[1] < free.shape[1]


def test_the_models_own_generation_defaults_hold() -> None:
    model, inputs = tiny_model(), prompts(1)
    default = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.8, eos_token_id=2, pad_token_id=0)
    try:
        want, got, _ = both(model, Random(TREES["dense"]), **inputs)
    finally:
        model.generation_config = default
    assert torch.equal(got, want) and got.shape[1] <= 16


class Once(LogitsProcessor):
    """Counts its calls and shifts what it sees by their number: any call too many shows."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.roll(self.calls % 3, dims=-1)


def test_a_single_sequence_calls_processors_as_plain_decoding_does() -> None:
    model, inputs = tiny_model(), prompts(1)
    counters = Once(), Once()
    want = plain(model, **inputs, **GREEDY, logits_processor=LogitsProcessorList([counters[0]]))
    with attach_drafter(model, Knowing(Tree.chain(3), texts(inputs, want))) as handle:
        got = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([counters[1]]))
    assert torch.equal(got, want) and handle.counts.tokens_per_step > 3
    allowed = {
        "prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1] + 1) % VOCABULARY, int(ids[-1] + 5) % VOCABULARY]
    }
    want, got, _ = both(model, Random(TREES["wide"]), **inputs, **GREEDY, **allowed)
    assert torch.equal(got, want)


def test_arguments_may_come_without_names() -> None:
    model, inputs = tiny_model(), prompts(1)
    config = GenerationConfig(max_new_tokens=9, do_sample=False)
    until = StoppingCriteriaList([Until()])
    want = type(model).generate(model, inputs["input_ids"], config, None, until)
    with attach_drafter(model, Random(TREES["dense"])) as handle:
        assert torch.equal(model.generate(inputs["input_ids"], config, None, until), want)
        assert handle.counts.generations == 1
        config.num_beams = 2
        model.generate(inputs["input_ids"], config)
        assert handle.counts.generations == 1


def test_what_asks_for_another_way_of_decoding_gets_it() -> None:
    model, inputs = tiny_model(), prompts(1)
    with attach_drafter(model, Random(TREES["dense"])) as handle:
        for other in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"custom_generate": type(model)._sample}):
            call = {**inputs, **GREEDY, **other}
            assert torch.equal(model.generate(**call), plain(model, **call))
        assert handle.counts.generations == 0
        several = model.generate(**inputs, do_sample=True, max_new_tokens=4, num_return_sequences=3)
        assert several.shape == (3, 13) and handle.counts.generations == 1
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    t5.eval()
    ids = torch.tensor([[3, 4, 5]])
    with attach_drafter(t5, Random(TREES["dense"])):
        assert torch.equal(t5.generate(ids, **GREEDY), plain(t5, inputs=ids, **GREEDY))


@pytest.mark.parametrize(
    ("words", "kind", "call"),
    [
        ("offloaded DynamicCache", "llama", {"cache_implementation": "offloaded"}),
        ("this one is none", "llama", {"use_cache": False}),
        ("the cache holds 12 rows and 32", "mistral_sliding", {"cache_implementation": "static"}),
        ("the cache holds 11 rows and 32", "mistral_sliding", {"past_key_values": "sliding"}),
        ("attentions or hidden states", "llama", {"return_dict_in_generate": True, "output_hidden_states": True}),
        ("works on 2 sequences in step only", "llama", {"prefix_allowed_tokens_fn": lambda b, ids: [3], "batch": 2}),
        ("inputs_embeds", "llama", {"inputs_embeds": torch.zeros(1, 9, 32)}),
        ("for greedy decoding and sampling", "llama", {"num_beams": 2, "by_hand": True}),
        ("synced_gpus", "llama", {"synced_gpus": True}),
    ],
)
def test_what_cannot_be_drafted_is_refused_in_a_sentence(words: str, kind: str, call: dict[str, Any]) -> None:
    model, call = tiny_model(kind), dict(call)
    inputs = prompts(call.pop("batch", 1))
    if call.get("past_key_values") == "sliding":
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(inputs["input_ids"][:, :2], past_key_values=cache)
        call["past_key_values"] = cache
    if "inputs_embeds" in call:
        del inputs["input_ids"]
    if call.pop("by_hand", False):
        call["custom_generate"] = DraftedDecoding(Random(TREES["dense"]))
    if call.pop("synced_gpus", False):
        decoding = DraftedDecoding(Random(TREES["dense"]))
        call["custom_generate"] = lambda *args, **kwargs: decoding(*args, synced_gpus=True, **kwargs)
    with attach_drafter(model, Random(TREES["dense"])), pytest.raises(ValueError, match=words) as caught:
        model.generate(**inputs, **GREEDY, **call)
    assert "\n" not in str(caught.value)
    assert not model.get_output_embeddings()._forward_pre_hooks


class Wrong(Random):
    """Proposes fewer tokens than its tree has nodes."""

    def propose(self, state: Any) -> Draft:
        draft = super().propose(state)
        return Draft(draft.tree, draft.tokens[:, 1:])


def test_attaching_what_does_not_fit_is_refused_in_a_sentence() -> None:
    model = tiny_model()
    with attach_drafter(model, Wrong(TREES["dense"])):
        with pytest.raises(ValueError, match="Wrong proposes tokens"):
            model.generate(**prompts(1), **GREEDY)
        with pytest.raises(ValueError, match="replaced already"):
            attach_drafter(model, Random(TREES["dense"]))
    strange = type(model)(CONFIGS["llama"]())
    strange.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no tree mask"):
        attach_drafter(strange, Random(TREES["dense"]))
    strange.config._attn_implementation = "sdpa"
    strange.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        attach_drafter(strange, Random(TREES["dense"]))


def test_detaching_leaves_no_trace() -> None:
    model, inputs = tiny_model(), prompts(2)
    before = {name: sorted(vars(part)) for name, part in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    handle = attach_drafter(model, Random(TREES["dense"]))
    model.generate(**inputs, **GREEDY)
    assert {name: sorted(vars(part)) for name, part in model.named_modules()} != before
    handle.detach()
    handle.detach()
    assert {name: sorted(vars(part)) for name, part in model.named_modules()} == before
    assert model.generate.__func__ is type(model).generate
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
