"""From a recipe to its task: the backbone, the text it learns from, and heads that start as the backbone's own."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.records import read_records, tokenize, training_records
from data.stepped import derive_seed
from data.text import IGNORED, Blocks, pack
from modules.hidden_states import check_layers
from modules.language_models import load_model
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer
from trainers import distill
from trainers.config import DistillConfig
from trainers.devices import training_device
from trainers.medusa.prompts import prompts_for
from trainers.medusa.task import MedusaTask
from trainers.schemas.medusa import Recipe

_ANSWERED_AT_ONCE = 64


def build_task(recipe: Recipe) -> MedusaTask:
    """Loads the backbone, packs its text, and makes heads that start as the backbone's own.

    Raises:
        ValueError: the recipe does not fit the backbone, or its text cannot be read.
    """
    backbone, data = recipe.backbone, recipe.data
    model, tokenizer = load_model(backbone.name, backbone.revision, backbone.dtype)
    model.to(training_device(recipe))
    pad = int(tokenizer.pad_token_id)
    text = cache(partial(_blocks, recipe, tokenizer))
    layer = OutputLayer.of(model)
    check_layers(recipe.module.layers, model)
    size = recipe.module.draft_vocab_size
    drafted = None if size is None else most_frequent(text(), size, layer.weight.shape[0])
    heads = MedusaHeads(_config(recipe, layer)).to(layer.weight.device)
    heads.start_from(layer, None if drafted is None else drafted.to(layer.weight.device))
    prompts = prompts_for("calibration", data.prompts or data.path, tokenizer, data.holdout, data.prompt_length)
    return MedusaTask(recipe, model, heads, text, [prompt.ids for prompt in prompts], pad)


def _config(recipe: Recipe, layer: OutputLayer) -> MedusaConfig:
    settings, (size, width) = recipe.module, layer.weight.shape
    return MedusaConfig(
        hidden_size=width,
        vocab_size=size,
        num_heads=settings.num_heads,
        num_blocks=settings.num_blocks,
        vocabulary=settings.vocabulary,
        draft_vocab_size=settings.draft_vocab_size,
        rank=settings.rank,
        reads=settings.reads,
        layers=settings.layers,
        output_bias=settings.vocabulary in ("own", "pruned") and layer.bias is not None,
        lora=recipe.lora.entry(),
    )


def _blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The text that is learned from, packed."""
    data = recipe.data
    records = read_records(str(_answers(recipe))) if data.answers else training_records(data.path)
    documents = [tokenize(record, tokenizer) for record in records]
    return pack(documents, data.length, int(tokenizer.pad_token_id), data.whole)


def _answers(recipe: Recipe) -> Path:
    """The folder of the backbone's own answers; what is there from an earlier run, or a part of it, is kept."""
    backbone, data = recipe.backbone, recipe.data
    settings = DistillConfig(
        backbone=backbone,
        prompts=data.path,
        output="",
        count=data.answers,
        max_new_tokens=data.answer_tokens,
        temperature=data.temperature,
        batch_size=_ANSWERED_AT_ONCE,
        seed=recipe.seed,
    )
    name = f"{derive_seed(settings.model_dump_json(exclude={'output', 'device'})):016x}"
    folder = Path(recipe.output_dir) / "answers" / name
    distill.run(settings.model_copy(update={"output": str(folder)}))
    return folder


def most_frequent(blocks: Blocks, count: int, vocabulary: int) -> Tensor:
    """The `count` tokens [V'] that are most often to be predicted, in the order of their ids; ties go to the lower."""
    if count > vocabulary:
        raise ValueError(f"module.draft_vocab_size is {count}, but the backbone knows {vocabulary} tokens")
    often = torch.bincount(blocks.labels[blocks.labels != IGNORED], minlength=vocabulary)
    return torch.sort(often, descending=True, stable=True).indices[:count].sort().values
