"""Held-out prompts, by category where the text has any: half of them calibrate, the other half judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from data.prompts import CATEGORIES, held_out_prompts
from data.records import STDLIB, Record, held_out_records

Half = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the kind of text that they begin."""

    ids: tuple[int, ...]
    category: str


def prompts_for(half: Half, source: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[Prompt]:
    """`count` prompts that nothing is trained on; the two halves share none.

    Args:
        source: as `data.records.read_records` takes it.  Of `stdlib` the categories take turns.
        length: most tokens of a prompt; the last ones are kept, for a conversation's answer follows them.
    Raises:
        ValueError: the source holds fewer.
    """
    place = 0 if half == "calibration" else 1
    if source == STDLIB:
        each = -(-count // len(CATEGORIES))
        found = [held_out_prompts(category, 2 * each)[place::2] for category in CATEGORIES]
        turns = zip(*found, strict=True)
        ids = [(_ids(text, tokenizer), name) for turn in turns for text, name in zip(turn, CATEGORIES, strict=True)]
    else:
        ids = [(_beginning(record, tokenizer, length), "all") for record in held_out_records(source)[place::2]]
    prompts = [Prompt(tuple(tokens[-length:]), name) for tokens, name in ids if tokens]
    if len(prompts) < count:
        raise ValueError(f"{source} holds {len(prompts)} held-out prompts for {half}, and {count} are asked for")
    return prompts[:count]


def _beginning(record: Record, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """What an answer would follow: the turns before the assistant's first, the prompt, or a text's beginning."""
    if "messages" in record:
        roles = [turn["role"] for turn in record["messages"]]
        turns = record["messages"][: roles.index("assistant")] if "assistant" in roles else record["messages"]
        if not turns:
            return []
        encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
        return list(encoded["input_ids"])
    if "prompt" in record:
        return _ids(record["prompt"], tokenizer)
    return _ids(record["text"], tokenizer)[:length]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
