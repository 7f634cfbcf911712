"""Tiny random causal language models that many tests share, with a tokenizer of bytes that loses nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|pad|>")
VOCABULARY = len(SPECIAL) + 256


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1], clean_up_tokenization_spaces=False
    )


def tiny_llama(layers: int = 2, seed: int = 0, hidden: int = 32, tied: bool = True) -> LlamaForCausalLM:
    """A random Llama, 4 query heads on 2 key heads, 128 positions, whose greedy choices vary along a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        eos_token_id=0, pad_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def save_tiny_llama(folder: Path, **settings: int | bool) -> Path:
    """The folder that `load_model` reads, written."""
    tiny_llama(**settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
