"""Tiny random causal language models of several families, and what tests of KV caches compare them by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

VOCABULARY = 96
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, eos_token_id=0, bos_token_id=None,
    initializer_range=0.3,
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(**{**_SIZES, **more}),
    "llama without groups": lambda **more: LlamaConfig(**{**_SIZES, "num_key_value_heads": 4, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**_SIZES, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**_SIZES, "head_dim": 16, **more}),
    "mistral with a window": lambda **more: MistralConfig(**{**_SIZES, "sliding_window": 24, **more}),
    "phi3": lambda **more: Phi3Config(**{**_SIZES, "sliding_window": None, **more}),
}


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A frozen random model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**more))
    return model.to(dtype).eval().requires_grad_(False)


def some_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [T] of different lengths as one batch, filled up on the left, and its mask."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.ones(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


def greedy(model: Any, ids: Tensor, new: int = 12, **call: Any) -> Tensor:
    """What the model goes on with, [B, new]."""
    call = {"attention_mask": torch.ones_like(ids), **call}
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **call)[:, ids.shape[1] :]


@torch.no_grad()
def logits_behind(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of tokens that follow what a cache has read."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits
