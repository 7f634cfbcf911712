"""Medusa on the tiny Llama: recipes that train in a second, and tasks on texts that anybody can continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.text import Blocks, TokenDocument, pack
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer
from tests.tiny_language import tiny_llama
from trainers import recipes
from trainers.medusa.task import MedusaTask

RECIPE = Path(__file__).with_name("medusa_tiny.yaml")
PAD = 1


def tiny_recipe(name: str, **changes: str) -> Any:
    """A recipe that trains on a saved tiny Llama in about a second; keys are written with __ for dots."""
    own = {key.replace("__", "."): value for key, value in changes.items()}
    return recipes.compose_recipe(str(RECIPE), {"backbone.name": name, **own})


def tiny_heads(model: Any, recipe: Any) -> MedusaHeads:
    """Heads as a training begins with them."""
    layer, settings = OutputLayer.of(model), recipe.module
    size, width = layer.weight.shape
    config = MedusaConfig(
        hidden_size=width,
        vocab_size=size,
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        vocabulary=settings.vocabulary,
        rank=settings.rank,
        lora=recipe.lora.model_dump(include={"rank", "alpha", "dropout", "targets"}) if recipe.lora.rank else None,
    )
    return MedusaHeads(config).start_from(layer)


def periodic(period: int, length: int, count: int) -> Blocks:
    """Blocks of one document each: 2, 3, .., period + 1, 2, 3, .. from any phase."""
    texts = [[2 + (phase + t) % period for t in range(length)] for phase in range(count)]
    return pack([TokenDocument(ids, [True] * length) for ids in texts], length, PAD, whole=True)


def tiny_task(blocks: Blocks, model: Any = None, prompts: Any = ((5, 6, 7), (9, 4)), **changes: str) -> MedusaTask:
    """A task on given blocks, without the data that its recipe names."""
    recipe = tiny_recipe("folder", **changes)
    model = tiny_llama() if model is None else model
    torch.manual_seed(0)
    return MedusaTask(recipe, model, tiny_heads(model, recipe), blocks, prompts, PAD)
