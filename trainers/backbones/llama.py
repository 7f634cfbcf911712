"""The embedded `llama`, a language model of the standard library's text, and the small `llama_draft` beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data.stdlib_text import held_out_documents, training_documents
from trainers.backbones.language import Recipe, build_model, measure, stream_of, train, train_tokenizer

VOCABULARY = 4096
BACKBONE = Recipe(minutes=45, hidden_size=256, intermediate_size=640, layers=6, heads=4, key_value_heads=2)
_JUDGED = 20_000  # tokens that are judged by while training


def tokenizer_of(state: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, made once and then read."""
    folder = state / "tokenizer"
    if not folder.is_dir():
        train_tokenizer([document.text for document in training_documents()], VOCABULARY).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_backbone(state: Path, recipe: Recipe = BACKBONE) -> LlamaForCausalLM:
    """The language model before anything is done about loops; `state` is where it can be continued from."""
    tokenizer = tokenizer_of(state)
    model = build_model(recipe, tokenizer)
    held_out = stream_of(held_out_documents(), tokenizer)
    size = sum(len(document.text.encode()) for document in held_out_documents())
    few = held_out.head(_JUDGED)

    def judge() -> str:
        return str(measure(model, few, round(size * _JUDGED / len(held_out))))

    return train("llama", model, stream_of(training_documents(), tokenizer), recipe, state / "llama.pt", judge=judge)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_backbone(Path("outputs/backbones/llama.state"))
