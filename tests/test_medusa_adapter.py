"""What an adapter of Medusa's heads weighs, and that tensors of other heads are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import data
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer, heads_of
from tests.test_medusa_heads import D, heads_for, small
from trainers import recipes


@pytest.mark.parametrize(
    ("vocabulary", "changes", "most"),
    [
        ("tied", {"module.layers": "[]"}, 0.05),
        ("tied", {"module.stored": "bfloat16"}, 0.05),
        ("own", {}, 0.60),
    ],
)
def test_an_adapter_is_small_beside_its_backbone(vocabulary: str, changes: dict[str, str], most: float) -> None:
    """The shipped recipe's heads with another vocabulary, as shares of the bytes of the embedded language model."""
    own = {"module.vocabulary": vocabulary, "module.draft_vocab_size": "null", **changes}
    settings = recipes.compose_recipe("medusa_llama", own).module
    backbone = AutoConfig.from_pretrained(Path(data.__file__).parent / "embedded" / "llama")
    config = MedusaConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        vocabulary=vocabulary,
        reads=settings.reads,
        layers=settings.layers,
    )
    with torch.device("meta"):
        modules = MedusaHeads(config), LlamaForCausalLM(backbone)
    heads, whole = (sum(parameter.numel() for parameter in module.parameters()) for module in modules)
    assert heads * (2 if settings.stored == "bfloat16" else 4) <= most * 4 * whole


def test_tensors_of_other_heads_are_refused_in_a_sentence() -> None:
    model = small("llama")
    heads = heads_for(OutputLayer.of(model), reads="path")
    tensors = dict(heads.state_dict())
    assert heads_of(heads.config, tensors, model).config == heads.config
    older = {**tensors, "heads.1.path.weight": torch.zeros(D, 2 * D)}
    with pytest.raises(ValueError, match=r"heads\.1\.path\.weight is \(16, 32\).*no such tensor \(1 such\): train it"):
        heads_of(heads.config, older, model)
    with pytest.raises(ValueError, match=r"heads\.0\.path\.weight is missing"):
        heads_of(heads.config, {name: t for name, t in tensors.items() if name != "heads.0.path.weight"}, model)
