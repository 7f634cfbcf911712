"""What a cache holds is what it tells: bytes, units, and caches that are filled up for measuring."""

from __future__ import annotations

import pytest
import torch

from modules.kv_host import CachePolicy, attach_cache
from modules.token_selectors import KeyNorm
from tests.tiny_kv_models import greedy, logits_behind, some_ids, tiny_model
from trainers.kv_cases import baseline_case, cache_bytes, filled_cache


def test_bytes_are_those_of_the_storages() -> None:
    model, ids = tiny_model(), some_ids(3, 50)
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=11, chunk=13, local=4)) as handle:
        greedy(model, ids, 3)
        cache = handle.host.last
        units, heads, size = 11 + 4 + 2, 2, 8
        tensors = [t for layer in cache.layers for t in layer.units.tensors()]
        assert cache.memory_bytes() == sum(t.untyped_storage().nbytes() for t in tensors)
        # Keys, values and scores in float32 of two layers, and nothing else.
        assert cache.memory_bytes() == 2 * 3 * heads * units * (2 * size + 1) * 4


@pytest.mark.parametrize("family", ["phi3", "mistral with a window"])
def test_what_is_stored_hangs_on_to_nothing_else(family: str) -> None:
    """Phi-3 cuts values out of a wider projection; a window needs places, which all heads share at first."""
    model, ids = tiny_model(family), some_ids(1, 36)
    numbers = 2 * 8 + 1 + (family != "phi3")
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=12, chunk=12)) as handle:
        assert handle.prefill(ids[:, :12]).memory_bytes() == 2 * 2 * 12 * numbers * 4
        assert handle.prefill(ids).memory_bytes() == 2 * 2 * 12 * numbers * 4
        ordered = handle.prefill(ids, ordered=True)
        for mine, theirs in zip(handle.prefill(ids).layers, ordered.layers, strict=True):
            torch.testing.assert_close(mine.units.scores.sort().values, theirs.units.scores.sort().values)


@pytest.mark.parametrize("family", ["llama", "mistral with a window"])
@pytest.mark.parametrize("budget", [None, 9])
def test_a_stretched_cache_is_as_large_as_one_that_was_read(family: str, budget: int | None) -> None:
    model, ids = tiny_model(family), some_ids(1, 50)
    with attach_cache(model, selector=KeyNorm(), policy=CachePolicy(budget=budget, local=3)) as handle:
        read, stretched = handle.prefill(ids, chunk=16), handle.prefill(ids[:, :20])
        stretched.stretch(50)
        assert stretched.units() == read.units() and stretched.memory_bytes() == read.memory_bytes()
        assert stretched.get_seq_length() == read.get_seq_length() == 50
        assert logits_behind(model, stretched, ids[:, :1]).isfinite().all()


def test_a_full_cache_is_filled_without_being_read() -> None:
    model, ids = tiny_model(), some_ids(1, 30)
    with baseline_case(model).enter(90) as reader:
        filled = filled_cache(reader, ids, 90)
    assert filled.get_seq_length() == 90 and cache_bytes(filled) == 2 * 2 * 2 * 90 * 8 * 4
    assert logits_behind(model, filled, ids[:, :1]).isfinite().all() and filled.get_seq_length() == 91
    windowed = tiny_model("mistral with a window")
    with baseline_case(windowed).enter(90) as reader:  # what a window holds is read
        assert filled_cache(reader, ids, 90).get_seq_length() == 90
