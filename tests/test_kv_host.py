"""The KV-cache host: the model's own text at full budget, what is kept at less, and never more than was allowed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modules.contracts import TokenSelector
from modules.kv_host import CachePolicy, HeldUnits, NewTokens, attach_cache, attention_sites
from modules.kv_host.interface import NAME
from modules.kv_host.roles import rotary_frequencies, rotate
from modules.token_selectors import ExpectedAttention, KeyDifference, KeyNorm, Random, SinkAndWindow, SnapKV
from tests.tiny_kv_models import CONFIGS, greedy, logits_behind, padded, some_ids, tiny_model


class Marked(TokenSelector):
    """Scores by place, given per head: what tests decide by hand."""

    def __init__(self, score: Any) -> None:
        self.of = score

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        heads = [self.of(new.positions.float(), head) for head in range(new.keys.shape[1])]
        return torch.stack(heads, dim=1)


def selectors(model: Any) -> dict[str, TokenSelector]:
    return {
        "sink and window": SinkAndWindow(2),
        "key norm": KeyNorm(),
        "KeyDiff": KeyDifference(),
        "SnapKV": SnapKV(window=4),
        "expected attention": ExpectedAttention(model, ahead=32),
    }


# Nothing given up is nothing changed.


@pytest.mark.parametrize("family", CONFIGS)
def test_a_cache_that_keeps_everything_is_the_models_own(family: str) -> None:
    model, ids = tiny_model(family), some_ids(2, 60)
    with torch.no_grad():
        want, text = model(ids).logits, greedy(model, ids)
    for policy in (CachePolicy(), CachePolicy(budget=60, chunk=16), CachePolicy(budget=200, chunk=7, local=9)):
        with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
            assert torch.equal(greedy(model, ids), text)
            cache = handle.prefill(ids[:, :40])
            torch.testing.assert_close(logits_behind(model, cache, ids[:, 40:]), want[:, 40:], rtol=0, atol=2e-5)


def test_a_large_budget_is_chunked_reading_without_eviction_bit_for_bit() -> None:
    model, ids = tiny_model(), some_ids(1, 60)
    for positions in ("original", "compact"):
        got = []
        for more in ({}, {"budget": 60, "stabilizers": 3}):
            policy = CachePolicy(chunk=16, positions=positions, **more)
            with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
                got.append(logits_behind(model, handle.prefill(ids[:, :48]), ids[:, 48:]))
        assert torch.equal(*got)


def test_compact_positions_change_nothing_while_nothing_is_evicted() -> None:
    model, ids = tiny_model(), some_ids(1, 60)
    with torch.no_grad():
        want = model(ids).logits[:, 48:]
    with attach_cache(
        model, selector=KeyNorm(), policy=CachePolicy(budget=60, chunk=16, positions="compact")
    ) as handle:
        got = logits_behind(model, handle.prefill(ids[:, :48]), ids[:, 48:])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_library_that_wraps_every_attention_function_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), some_ids(1, 20)
    text = greedy(model, ids)

    def wrapper(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError(f"{type(key).__name__} has no shape")  # as a wrapper does that reads keys as tensors

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, NAME, wrapper)
    with attach_cache(model, selector=KeyNorm()):
        assert torch.equal(greedy(model, ids), text)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_calls_of_an_attached_model_are_as_before(implementation: str) -> None:
    model, ids = tiny_model(), some_ids(2, 20)
    model.set_attn_implementation(implementation)
    both, mask = padded([ids[0], ids[1, :11]])
    with torch.no_grad():
        want = [model(ids).logits, model(both, attention_mask=mask).logits[:, 9:]]
        bits = {name: value.clone() for name, value in model.state_dict().items()}
        with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=8, chunk=4)):
            cached = model(ids, past_key_values=DynamicCache(config=model.config)).logits
            got = [model(ids).logits, model(both, attention_mask=mask).logits[:, 9:]]
        torch.testing.assert_close([*got, cached], [*want, want[0]], rtol=0, atol=2e-5)
        assert torch.equal(model(ids).logits, want[0])
    assert model.config._attn_implementation == implementation
    assert "generate" not in vars(model) and "_prefill" not in vars(model)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


# What is kept.


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "mistral with a window"])
def test_no_layer_ever_holds_more_than_budget_and_chunk(family: str) -> None:
    model, chance = tiny_model(family), random.Random(0)
    for _ in range(6):
        length, budget, chunk = chance.randint(20, 90), chance.randint(3, 40), chance.randint(1, 30)
        local, new = chance.randint(0, 9), chance.randint(1, 6)
        policy = CachePolicy(budget=budget, chunk=chunk, local=local, stabilizers=min(2, budget - 1))
        ids = some_ids(1, length, seed=length)
        with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
            cache = handle.prefill(ids)
            assert max(cache.peak_units()) <= max(budget + chunk, budget + local)
            assert cache.units() == [min(budget, length - local) + local] * 2
            greedy(model, ids, new)
            after = handle.host.last
            assert after.units() == [min(budget, length - local) + local + new - 1] * 2
            assert max(after.peak_units()) <= max(budget + chunk, budget + local + new)


def test_exactly_the_best_of_the_whole_prompt_stay() -> None:
    model, ids = tiny_model(num_hidden_layers=1), some_ids(2, 50)
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=7, chunk=50)) as handle:
        whole = handle.prefill(ids, budget=None).layers[0].units
    want = whole.scores.topk(7, dim=2).indices.sort(dim=2).values
    for positions in ("original", "compact"):
        with attach_cache(
            model, selector=KeyNorm(), policy=CachePolicy(budget=7, chunk=9, positions=positions)
        ) as handle:
            kept = handle.prefill(ids).layers[0].units
        assert torch.equal(kept.scores.sort(dim=2).values, whole.scores.gather(2, want).sort(dim=2).values)
        values = whole.parts[0][1].gather(2, want[..., None].expand(-1, -1, -1, 8))
        order = kept.parts[0][1].sum(-1).argsort(dim=2)[..., None].expand(-1, -1, -1, 8)
        wanted = values.sum(-1).argsort(dim=2)[..., None].expand(-1, -1, -1, 8)
        torch.testing.assert_close(kept.parts[0][1].gather(2, order), values.gather(2, wanted), rtol=0, atol=1e-6)


def test_heads_may_keep_different_tokens_and_layers_different_numbers() -> None:
    model, ids = tiny_model(), some_ids(1, 32)
    odd_or_even = Marked(lambda places, head: 1e3 * ((places % 2) == 1 - head) + places)
    policy = CachePolicy(budget=(16, 5), chunk=8)
    with attach_cache(model, selector=odd_or_even, policy=policy) as handle:
        cache = handle.prefill(ids)
        assert cache.units() == [16, 5]
        first = cache.layers[0].units.scores[0].sort(dim=1).values % 1e3
        assert first.tolist() == [list(range(1, 32, 2)), list(range(0, 32, 2))]
        assert greedy(model, ids).shape == (1, 12)
        with pytest.raises(ValueError, match="budget names 3 layers, and the model has 2"):
            handle.use(budget=(1, 2, 3))


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_tokens_come_together_or_one_by_one_behind_layers_of_different_sizes(positions: Any) -> None:
    model, ids = tiny_model(), some_ids(2, 46)
    policy = CachePolicy(budget=(16, 5), chunk=8, positions=positions)
    with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
        cache = handle.prefill(ids[:, :40])
        together = logits_behind(model, handle.resume(cache), ids[:, 40:])
        branch = handle.resume(cache)
        alone = [logits_behind(model, branch, ids[:, place : place + 1]) for place in range(40, 46)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_stabilizers_survive_every_chunk_but_the_last_and_keep_their_scores() -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    with attach_cache(model, selector=Marked(lambda places, head: -places), policy=CachePolicy()) as handle:
        for length, want in ((10, [0, 1, 2, 3, 4, 5]), (20, [0, 1, 2, 7, 8, 9]), (30, [0, 1, 2, 17, 18, 19])):
            cache = handle.prefill(ids[:, :length], budget=6, chunk=10, stabilizers=3)
            assert sorted((-cache.layers[0].units.scores[0, 0]).tolist()) == want
    with pytest.raises(ValueError, match="fewer stabilizers"):
        CachePolicy(budget=4, stabilizers=4)


# Text goes on.


def test_generate_reads_unseen_tokens_only_and_goes_on_at_the_right_place() -> None:
    model, ids = tiny_model(), some_ids(1, 50)
    read: list[tuple[int, int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        read.append((kwargs["input_ids"].shape[1], int(kwargs["position_ids"][0, -1])))

    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=10, chunk=20, local=4)) as handle:
        hook = model.register_forward_pre_hook(look, with_kwargs=True)
        first = greedy(model, ids, 4)
        hook.remove()
        assert read == [(20, 19), (20, 39), (6, 45), (4, 49), (1, 50), (1, 51), (1, 52)]
        # A conversation goes on in the cache of its last turn, whether it is given whole or by its new part.
        cache = handle.host.last
        assert cache.get_seq_length() == 53 and max(cache.units()) == 17
        more = torch.cat([ids, first, some_ids(1, 11, seed=1)], dim=1)
        hook = model.register_forward_pre_hook(look, with_kwargs=True)
        read.clear()
        greedy(model, more, 2, past_key_values=cache)
        hook.remove()
    assert read == [(8, 60), (4, 64), (1, 65)]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("chunk", [10, 11])  # 56 tokens of 11 leave a chunk of one, which is filling for most rows
def test_a_row_of_a_batch_is_as_if_it_were_alone(positions: Any, chunk: int) -> None:
    model = tiny_model()
    rows = [some_ids(1, length, seed=length)[0] for length in (47, 60, 5, 33)]
    ids, mask = padded(rows)
    for name, selector in selectors(model).items():
        policy = CachePolicy(budget=12, chunk=chunk, local=4, stabilizers=2, positions=positions)
        with attach_cache(model, selector=selector, policy=policy) as handle:
            together = greedy(model, ids, attention_mask=mask, past_key_values=handle.cache())
            for row, mine in zip(rows, together, strict=True):
                assert torch.equal(greedy(model, row[None])[0], mine), (name, len(row))


def test_beams_and_several_samples_take_their_rows_along() -> None:
    model, ids = tiny_model(), some_ids(2, 40)
    plain = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(chunk=16)) as handle:
        assert torch.equal(model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False), plain)
        handle.use(budget=9)
        assert model.generate(ids, max_new_tokens=8, num_return_sequences=2, do_sample=True).shape[0] == 4
        assert max(handle.host.last.units()) <= 9 + 8


def test_decoding_is_cut_back_every_few_tokens() -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    for positions in ("original", "compact"):
        policy = CachePolicy(budget=10, chunk=20, local=4, decode_every=5, positions=positions)
        with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
            greedy(model, ids, 31)
            assert handle.host.last.units() == [14, 14] and handle.host.last.get_seq_length() == 70
            assert max(handle.host.last.peak_units()) == 10 + 16  # the second chunk had 16 tokens


def test_a_cache_is_branched_and_outlives_its_handle() -> None:
    model, ids, more = tiny_model(), some_ids(1, 30), some_ids(1, 6, seed=1)
    selector = ExpectedAttention(model)
    with attach_cache(model, selector=selector, policy=CachePolicy(budget=9, chunk=8)) as handle:
        cache = handle.prefill(ids)
        branch = handle.resume(cache)
        want = logits_behind(model, branch, more)
        assert cache.units() == [9, 9] and branch.units() == [15, 15]
        torch.testing.assert_close(logits_behind(model, handle.resume(cache), more), want, rtol=0, atol=1e-6)
    with attach_cache(model, selector=selector) as handle:
        with pytest.raises(ValueError, match=r"go on with handle\.resume\(cache\)"):
            logits_behind(model, cache, more)
        torch.testing.assert_close(logits_behind(model, handle.resume(cache), more), want, rtol=0, atol=1e-6)


# Positions and places.


def test_compact_equals_keys_rotated_from_scratch() -> None:
    """Against a cache of unrotated keys, rotated to 0, 1, 2, .. anew: what the paper does."""
    model, ids = tiny_model(num_hidden_layers=1), some_ids(1, 40)
    frequencies = rotary_frequencies(model)
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=9, chunk=12, positions="compact")) as handle:
        compact = handle.prefill(ids).layers[0].units
        whole = handle.prefill(ids, budget=None, chunk=None).layers[0].units
    place = whole.scores.topk(9, dim=2).indices.sort(dim=2).values
    keys = rotate(whole.parts[0][0], -torch.arange(40).expand(1, 2, 40), frequencies)  # as they were before rotation
    keys = keys.gather(2, place[..., None].expand(-1, -1, -1, 8))
    want = rotate(keys, torch.arange(9).expand(1, 2, 9), frequencies)
    torch.testing.assert_close(compact.parts[0][0], want, rtol=0, atol=1e-5)


def test_newcomers_in_the_places_of_those_who_left_change_no_logit() -> None:
    model, ids = tiny_model(), some_ids(2, 60)
    got = []
    for ordered in (False, True):
        policy = CachePolicy(budget=11, chunk=13, ordered=ordered)
        with attach_cache(model, selector=KeyNorm(), policy=policy) as handle:
            cache = handle.prefill(ids[:, :48])
            got.append((cache.layers[0].units.scores.clone(), logits_behind(model, cache, ids[:, 48:])))
    assert not torch.equal(got[0][0], got[1][0])  # another order,
    torch.testing.assert_close(got[0][1], got[1][1], rtol=0, atol=1e-5)  # the same attention


def test_a_question_that_is_read_first_is_seen_by_every_later_token() -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    policy = CachePolicy(budget=8, chunk=12, local=5, query_first=True)
    seen: list[Tensor] = []
    with attach_cache(model, selector=Marked(lambda places, head: -places), policy=policy) as handle:
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
        )
        cache = handle.prefill(ids)
        hook.remove()
        # Lowest places score best: the question's own, before 0, are all kept.
        assert sorted((-cache.layers[0].units.scores[0, 0]).tolist())[:5] == [-5, -4, -3, -2, -1]
        assert cache.get_seq_length() == 40
        with pytest.raises(ValueError, match="no more than those"):
            handle.prefill(ids[:, :5])
    assert torch.cat(seen).tolist() == [*range(-5, 0), *range(40)]


def test_chunks_of_a_long_text_are_rotated_as_the_whole_is() -> None:
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    longrope["original_max_position_embeddings"] = 32
    model = tiny_model("phi3", original_max_position_embeddings=32, rope_parameters=longrope)
    seen: list[Tensor] = []
    for length in (50, 30):
        ids = some_ids(1, length)
        with torch.no_grad():
            want = model(ids).logits[:, -8:]
        with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(chunk=10, local=8)) as handle:
            hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
            handle.prefill(ids)
            hook.remove()
        torch.testing.assert_close(seen[-1], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sink and window", "key norm", "KeyDiff", "SnapKV", "expected attention"])
def test_untrained_members_keep_what_they_say(name: str) -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    selector = selectors(model)[name]
    with attach_cache(model, selector=selector, policy=CachePolicy(budget=10)) as handle:
        everything = handle.prefill(ids, budget=None).layers[0].units
        kept = handle.prefill(ids).layers[0].units.parts[0][0]
    keys = everything.parts[0][0]
    places = [[(keys[0, head] == one).all(-1).nonzero()[0].item() for one in kept[0, head]] for head in (0, 1)]
    if name == "sink and window":
        assert places == [[0, 1, *range(32, 40)]] * 2
    elif name == "key norm":
        assert places == [sorted(keys[0, head].norm(dim=-1).argsort()[:10].tolist()) for head in (0, 1)]
    elif name == "KeyDiff":
        unit = torch.nn.functional.normalize(keys[0], dim=-1)
        alike = (unit @ unit.mean(1, keepdim=True).transpose(1, 2))[..., 0]
        assert places == [sorted(alike[head].argsort()[:10].tolist()) for head in (0, 1)]
    elif name == "SnapKV":
        assert all(own[-4:] == [36, 37, 38, 39] for own in places)
    else:
        assert all(own[:4] == [0, 1, 2, 3] for own in places)


def test_snapkv_scores_are_the_windows_mean_attention() -> None:
    model, ids = tiny_model(num_hidden_layers=1), some_ids(1, 30)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0, :, -4:]  # [H_q, 4, 30]
    pooled = torch.nn.functional.avg_pool1d(
        weights.mean(1).view(2, 2, 30).mean(1), 5, stride=1, padding=2, count_include_pad=False
    )
    scores: list[Tensor] = []

    class Noted(SnapKV):
        def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
            scores.append(super().score(new, held))
            return scores[-1]

    with attach_cache(model, selector=Noted(window=4), policy=CachePolicy(budget=10)) as handle:
        handle.prefill(ids)
    torch.testing.assert_close(scores[0][0, :, :26], pooled[:, :26], rtol=1e-4, atol=1e-6)


# What is refused.


def test_misuse_is_told_in_one_sentence() -> None:
    model, ids = tiny_model(), some_ids(1, 20)
    with pytest.raises(ValueError, match="belongs to a causal language model"):
        attach_cache(torch.nn.Linear(2, 2), selector=KeyNorm())
    with attach_cache(model, selector=KeyNorm()) as handle:
        with pytest.raises(ValueError, match="has a selector already, a KeyNorm"):
            attach_cache(model, selector=Random())
        with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
            greedy(model, ids, past_key_values=DynamicCache(config=model.config))
        with pytest.raises(ValueError, match="an evicted token is gone"):
            greedy(model, ids, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="read in chunks: give input_ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)
        with pytest.raises(ValueError, match="positions is 'absolute'"):
            handle.use(positions="absolute")
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    phi = tiny_model("phi3", original_max_position_embeddings=256, rope_parameters=longrope)
    with pytest.raises(ValueError, match="one of kind longrope: use positions original"):
        attach_cache(phi, selector=KeyNorm(), policy=CachePolicy(positions="compact"))
    assert "generate" not in vars(phi)


def test_the_parts_of_a_model_are_found_by_what_they_do() -> None:
    for family in CONFIGS:
        sites = attention_sites(tiny_model(family))
        kv_heads = 4 if family == "llama without groups" else 2
        assert [(site.index, site.query_heads, site.kv_heads) for site in sites] == [(0, 4, kv_heads), (1, 4, kv_heads)]
        widths = sum(part.out_features for part in sites[0].projections)
        assert widths == sites[0].feature_width
