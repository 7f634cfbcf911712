"""On the embedded language model: 200 held-out prompts decode to plain decoding's tokens, whatever the heads say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.prompts import CATEGORIES, held_out_prompts
from modules.language_models import load_model
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer, attach_heads
from modules.medusa.heads import MedusaHead

pytestmark = pytest.mark.slow
PROMPTS, NEW, NODES = 200, 24, [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]


@pytest.fixture(scope="module")
def plain() -> tuple[Any, OutputLayer, list[torch.Tensor], list[torch.Tensor]]:
    """Model, output layer, prompts, and what it goes on with by itself."""
    model, tokenizer = load_model("embedded:llama")
    each = -(-PROMPTS // len(CATEGORIES))
    texts = [text for category in CATEGORIES for text in held_out_prompts(category, each)][:PROMPTS]
    prompts = [tokenizer(text, return_tensors="pt").input_ids[:, -96:] for text in texts]
    return model, OutputLayer.of(model), prompts, [decode(model, ids) for ids in prompts]


def decode(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)


def heads_that(kind: str, layer: OutputLayer) -> MedusaHeads:
    """untrained: the model's own head four times.  random: noise.  adversarial: the model's least likely tokens."""
    size, width = layer.weight.shape
    config = MedusaConfig(hidden_size=width, vocab_size=size, vocabulary="own", tree=NODES)
    heads = MedusaHeads(config).start_from(layer)
    with torch.no_grad():
        for parameter in heads.parameters():
            if kind == "random":
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        if kind == "adversarial":
            for head in heads.heads:
                assert isinstance(head, MedusaHead)
                head.vocabulary.weight.neg_()
    return heads.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["untrained", "random", "adversarial"])
def test_greedy_text_is_that_of_plain_decoding(plain: Any, kind: str) -> None:
    model, layer, prompts, want = plain
    with attach_heads(model, heads_that(kind, layer), layer) as handle:
        got = [decode(model, ids) for ids in prompts]
        assert 1 <= handle.counts.tokens_per_step <= 5
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
