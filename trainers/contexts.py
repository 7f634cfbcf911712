"""From settings to contexts: what a learned KV cache is trained on, and what it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.contexts import AnsweredPrompts, ContextRows, ContextSource, TextWindows
from data.needle import VOCABULARY, Needles
from data.records import Record, held_out_records, tokenize, training_records
from data.text import TokenStream
from trainers.context_settings import NEEDLE, ContextData


def training_source(data: ContextData, model: Any, tokenizer: PreTrainedTokenizerBase) -> ContextSource:
    """The rows that a recipe learns from.

    Raises:
        ValueError: they cannot be read, or the backbone does not know their tokens.
    """
    if data.kind == NEEDLE:
        check_needles(model)
        fewest = 0 if data.decoys else None
        more = {"shortest": data.shortest, "decoys": data.decoys, "fewest": fewest, "known": data.known}
        return Needles(data.length, data.needles, data.questions, **more)
    records = training_records(data.path)
    if data.kind == "pairs":
        return AnsweredPrompts.of(records, tokenizer, data.length)
    return TextWindows(_stream(records, tokenizer), data.length, data.following)


def held_out_rows(
    source: str, tokenizer: PreTrainedTokenizerBase, context: int, count: int, batch_size: int, **needles: Any
) -> list[ContextRows]:
    """`count` rows to judge by, in batches; a text that has fewer gives what it has.

    Args:
        source: `needle`, or where text comes from.
        needles: of `needle`: `seed`, and fields of `data.needle.Needles`.
    """
    made: ContextSource
    if source == NEEDLE:
        seed = needles.pop("seed", 0)
        made = Needles(context, name=f"held out {seed}", count=count, **needles)
    else:
        made = TextWindows(_stream(held_out_records(source), tokenizer), context, context // 3)
    index = torch.arange(min(count, len(made)))
    return [made.rows(part) for part in index.split(batch_size)]


def check_needles(model: Any) -> None:
    """Raise ValueError unless the backbone is one of needles."""
    if model.config.vocab_size != VOCABULARY:
        raise ValueError(
            f"needles are made of {VOCABULARY} tokens and the backbone knows {model.config.vocab_size}: use "
            "backbone embedded:needle, or data.kind text"
        )


def _stream(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    return TokenStream.of([tokenize(record, tokenizer) for record in records])
