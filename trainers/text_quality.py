"""How good a language model's text is: bits per byte, first choices, and how much it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from data.text import IGNORED, Blocks, TokenStream


@dataclass(frozen=True)
class TextQuality:
    """On whole documents in blocks of one length.

    bits_per_byte: of the UTF-8 text.
    top1: share of the tokens that are the model's first choice.
    """

    bits_per_byte: float
    top1: float


def next_token_loss(logits: Tensor, blocks: Blocks) -> Tensor:
    """Mean cross-entropy in nats of the next token; logits [B, T, V]."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), blocks.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def measure_text(
    model: PreTrainedModel, stream: TokenStream, text_bytes: int, length: int, batch_size: int = 8
) -> TextQuality:
    """The quality over a stream of `text_bytes` bytes, in blocks of `length` tokens that overlap by one.

    The tail that fills no block is left out, of the bytes by its share of the tokens.
    """
    model.eval()
    length = min(length, len(stream))
    starts = torch.arange(0, len(stream) - length + 1, length - 1)
    nats, hits, scored = 0.0, 0, 0
    for first in range(0, len(starts), batch_size):
        blocks = stream.windows(starts[first : first + batch_size], length)
        logits, wanted = model(**blocks.model_inputs()).logits, blocks.labels[:, 1:]
        known = int((wanted != IGNORED).sum())
        nats += float(next_token_loss(logits, blocks)) * known
        hits += int((logits[:, :-1].argmax(-1) == wanted).sum())
        scored += known
    return TextQuality(nats / math.log(2) / (text_bytes * scored / len(stream)), hits / scored)


def repeated_share(sequences: Sequence[Sequence[int]], size: int = 3) -> float:
    """Share of the sequences' n-grams of `size` tokens that stood earlier in the same sequence: 0 to 1.

    A text that loops has a share near 1.  A real one has one as well (code repeats its own phrases), so this number
    means something only beside that of the text which was to be continued.
    """
    grams = [[tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)] for ids in sequences]
    count = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / count if count else 0.0


@torch.no_grad()
def greedy_continuations(
    model: PreTrainedModel, prompts_BT: Tensor, new_tokens: int, batch_size: int = 32
) -> list[list[int]]:
    """What the model goes on with after prompts of equal length, each up to its end token."""
    found: list[list[int]] = []
    for part in prompts_BT.split(batch_size):
        out = model.generate(
            input_ids=part, attention_mask=torch.ones_like(part), max_new_tokens=new_tokens, do_sample=False
        )
        found += [_until(row, model.generation_config.eos_token_id) for row in out[:, part.shape[1] :].tolist()]
    return found


def _until(ids: list[int], end: int | list[int] | None) -> list[int]:
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]
