"""On the embedded language model: 200 held-out prompts decode to plain decoding's tokens, whatever the heads say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data.prompts import CATEGORIES, held_out_prompts
from data.records import tokenize, training_records
from data.text import pack
from modules.language_models import load_model
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer, attach_heads
from modules.medusa.heads import MedusaHead
from modules.medusa.output_layer import last_hidden_state
from trainers.medusa.objective import head_losses

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


def heads_that(kind: str, layer: OutputLayer, reads: str = "state") -> MedusaHeads:
    """untrained: the model's own head four times.  random: noise.  adversarial: the model's least likely tokens."""
    size, width = layer.weight.shape
    config = MedusaConfig(hidden_size=width, vocab_size=size, vocabulary="own", reads=reads, tree=NODES)
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


def trained_heads(model: Any, layer: OutputLayer, reads: str, steps: int = 40) -> MedusaHeads:
    """Heads that learned for a moment from the sources that the model learned from."""
    tokenizer = load_model("embedded:llama")[1]
    documents = [tokenize(record, tokenizer) for record in training_records("stdlib")[:60]]
    blocks = pack(documents, 256, int(tokenizer.pad_token_id))
    heads = heads_that("untrained", layer, reads).requires_grad_(True)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=5e-3)
    for step in range(steps):
        few = blocks.select((torch.arange(4) + 4 * step) % len(blocks))
        with torch.no_grad():
            hidden = last_hidden_state(model, **few.model_inputs())
        losses = head_losses(heads, hidden, few, layer, kind="ce", eta=0.0, rows=1024)
        torch.stack([one.loss for one in losses]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return heads.requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "reads"), [("untrained", "state"), ("random", "state"), ("adversarial", "state"), ("random", "path")]
)
def test_greedy_text_is_that_of_plain_decoding(plain: Any, kind: str, reads: str) -> None:
    model, layer, prompts, want = plain
    with attach_heads(model, heads_that(kind, layer, reads), layer) as handle:
        got = [decode(model, ids) for ids in prompts]
        assert 1 <= handle.counts.tokens_per_step <= 5
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.fixture(scope="module")
def trained(plain: Any) -> dict[str, MedusaHeads]:
    """By what they read."""
    model, layer, *_ = plain
    return {reads: trained_heads(model, layer, reads) for reads in ("state", "path")}


CHAIN, FAN = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]], [[rank] for rank in range(24)]


@pytest.mark.parametrize(("reads", "tree"), [("state", NODES), ("state", CHAIN), ("state", FAN), ("path", NODES)])
def test_trained_heads_and_any_tree_leave_the_text_as_it_is(
    plain: Any, trained: Any, reads: str, tree: list[list[int]]
) -> None:
    model, layer, prompts, want = plain
    with attach_heads(model, trained[reads], layer) as handle:
        handle.medusa.use_tree(tree)
        got = [decode(model, ids) for ids in prompts]
        assert handle.counts.tokens_per_step > 1.1
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
