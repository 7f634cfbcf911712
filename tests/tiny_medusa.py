"""Medusa on the tiny Llama: recipes that train in a second, and tasks on texts that anybody can continue."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from data.text import Blocks, TokenDocument, pack
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer
from tests.tiny_language import VOCABULARY, tiny_llama, tiny_tokenizer
from trainers import recipes
from trainers.medusa.task import MedusaTask

RECIPE = Path(__file__).with_name("medusa_tiny.yaml")
PAD = 1


def save_tiny(folder: Path) -> str:
    """Saves the tiny Llama, which speaks in small letters only, and beside it what it says.  Returns its name.

    Heads that learn what it says have something to guess: a random model's free text would be guessed by nobody.
    """
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    letters = tokenizer("abcdefgh", add_special_tokens=False).input_ids
    model.generation_config.suppress_tokens = [token for token in range(VOCABULARY) if token not in letters]
    choice = random.Random(0)
    prompts = ["".join(choice.choices("abcdefgh", k=6)) for _ in range(200)]
    ids = torch.tensor(tokenizer(prompts).input_ids)
    texts = model.generate(input_ids=ids, max_new_tokens=32, do_sample=False)[:, ids.shape[1] :]
    records = [
        {"prompt": p, "response": tokenizer.decode(t), "finished": False} for p, t in zip(prompts, texts, strict=True)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return str(folder / "llama")


def tiny_recipe(name: str, **changes: str) -> Any:
    """A recipe that trains on a saved tiny Llama in about a second; keys are written with __ for dots."""
    own = {key.replace("__", "."): value for key, value in changes.items()}
    text = str(Path(name).with_name("text.jsonl"))
    return recipes.compose_recipe(str(RECIPE), {"backbone.name": name, "data.path": text, **own})


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
        reads=settings.reads,
        layers=settings.layers,
        lora=recipe.lora.entry(),
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
    return MedusaTask(recipe, model, tiny_heads(model, recipe), lambda: blocks, prompts, PAD)
