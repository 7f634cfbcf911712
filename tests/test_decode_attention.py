"""Trees attend over the cache as it lies: grouped keys and values are not repeated for every query head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.decode_host import attach_drafter, attention
from tests.tiny_decode import GREEDY, TREES, Random, plain, prompts, tiny_model


def test_keys_and_values_reach_the_kernel_as_the_cache_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("llama", "sdpa"), prompts(1)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert groups < heads
    seen: set[tuple[int, int]] = set()
    kernel = attention.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> torch.Tensor:
        seen.add((query.shape[1], key.shape[1]))
        return kernel(query, key, value, **arguments)

    want = plain(model, **inputs, **GREEDY)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    with attach_drafter(model, Random(TREES["dense"])):
        assert torch.equal(model.generate(**inputs, **GREEDY), want)
    assert seen == {(heads, groups)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_attends_as_before_afterwards_even_after_an_error(implementation: str) -> None:
    model, inputs = tiny_model("llama", implementation), prompts(1)
    layers = [layer.self_attn.config for layer in model.model.layers]
    with attach_drafter(model, Random(TREES["dense"])):
        model.generate(**inputs, **GREEDY)
    assert {config._attn_implementation for config in [model.config, *layers]} == {implementation}
    with pytest.raises(RuntimeError, match="stop"), attention.grouped_attention(model):
        inside = model.config._attn_implementation
        raise RuntimeError("stop")
    assert inside == (attention.NAME if implementation == "sdpa" else "eager")
    assert {config._attn_implementation for config in [model.config, *layers]} == {implementation}
