"""A layer with room holds what transformers' own holds, whatever is done to it, and moves only what is new."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from modules.decode_host import attach_drafter
from modules.decode_host.growing import GrowingLayer
from tests.tiny_decode import GREEDY, TREES, Random, both, prompts, tiny_model


def rows(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, count, 4), torch.randn(batch, 3, count, 6)


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_the_plain_layer_holds(seed: int) -> None:
    choice, grown, plain, batch = random.Random(seed), GrowingLayer(), DynamicLayer(), 2
    torch.manual_seed(seed)
    for _ in range(120):
        what = choice.choice(["append"] * 6 + ["crop", "reorder", "repeat", "replace", "reset"])
        if what == "append":
            new = rows(choice.choice([1, 1, 7, 40]), batch)
            for mine, its in zip(grown.update(*new), plain.update(*new), strict=True):
                assert torch.equal(mine, its)
        elif not plain.get_seq_length():
            continue
        elif what == "crop":
            back = choice.randint(1, plain.get_seq_length())
            for layer in (grown, plain):
                layer.crop(-back)
        elif what == "reorder":
            for layer in (grown, plain):
                layer.reorder_cache(torch.arange(batch).flip(0))
        elif what == "repeat" and batch < 8:
            batch *= 2
            for layer in (grown, plain):
                layer.batch_repeat_interleave(2)
        elif what == "replace":
            for layer in (grown, plain):
                layer.keys, layer.values = layer.keys + 1, layer.values + 1
        elif what == "reset":
            for layer in (grown, plain):
                layer.reset()
        assert grown.get_seq_length() == plain.get_seq_length()
        if plain.get_seq_length():
            assert torch.equal(grown.keys, plain.keys) and torch.equal(grown.values, plain.values)


def test_a_step_leaves_what_is_held_where_it_is() -> None:
    layer = GrowingLayer()
    layer.update(*rows(10))
    places = set()
    for _ in range(60):
        layer.update(*rows(1))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1 and layer.keys.shape[-2] == 70
    layer.update(*rows(200))
    assert layer.keys.data_ptr() not in {key for key, _ in places}


def test_a_cache_that_was_begun_elsewhere_goes_on() -> None:
    model, inputs = tiny_model(), prompts(1)
    ids = inputs["input_ids"]
    whole = model.generate(**inputs, **GREEDY)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    before = [layer.keys for layer in cache.layers]
    kept = [keys.clone() for keys in before]
    with attach_drafter(model, Random(TREES["dense"])):
        out = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert torch.equal(out, whole)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    assert all(map(torch.equal, before, kept)), "tensors of somebody else were written to"
    _, out, _ = both(model, Random(TREES["dense"]), **inputs, **GREEDY, return_dict_in_generate=True)
    assert all(type(layer) is GrowingLayer for layer in out.past_key_values.layers)
