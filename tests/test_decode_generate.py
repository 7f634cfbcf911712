"""Streaming, stopping, refusals: what else a call of `generate` may ask for, and what attaching leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from modules.decode_host import Draft, DraftedDecoding, Tree, attach_drafter
from tests.tiny_decode import (
    CONFIGS,
    GREEDY,
    TREES,
    VOCABULARY,
    Knowing,
    Ragged,
    Random,
    both,
    plain,
    prompts,
    texts,
    tiny_model,
)


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


class ByRow(LogitsProcessor):
    """Means something else for every sequence of the batch, and insists on seeing them all."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores) == 3
        return torch.stack([score.roll(5 * row) for row, score in enumerate(scores)])


def test_processors_that_know_the_batch_find_each_sequence_in_its_place() -> None:
    model, inputs = tiny_model(), prompts(3)
    call = {**inputs, **GREEDY, "logits_processor": LogitsProcessorList([ByRow()])}
    known = texts(inputs, plain(model, **call))
    for drafter in (Ragged(known), Random(TREES["dense"])):
        want, got, _ = both(model, drafter, **call)
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
    for implementation in ("flash_attention_2", "flex_attention"):
        strange.config._attn_implementation = implementation
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
