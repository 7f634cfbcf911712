"""Causal language models by name, frozen, with their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modules.embedded import source_of


def load_model(
    name: str, revision: str | None = None, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen model in evaluation mode and its tokenizer, from a Hub id, a folder, or `embedded:<name>`.

    The tokenizer pads on the left, as generation in batches needs; where it has no padding token, the end token stands
    in for it.  The model's generation settings are its own.

    Args:
        dtype: of the weights in memory, whatever they are stored in.
    Raises:
        ValueError: no such embedded backbone, the folder holds no language model or no tokenizer, or no such dtype.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"backbone.dtype is '{dtype}': it must be float32, bfloat16 or float16")
    source = source_of(name, "config.json", "language model")
    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=kind)
    return model.requires_grad_(False).eval(), load_tokenizer(name, revision)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `load_model` alone, in well under the time that the weights take.

    Raises:
        ValueError: see `load_model`.
    """
    source = source_of(name, "config.json", "language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"backbone.name is '{name}', whose tokenizer cannot be read: {reason}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of '{name}' has neither a padding nor an end token: give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences the loading bar, and leaves it as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


__all__ = ["load_model", "load_tokenizer"]
