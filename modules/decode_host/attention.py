"""Attention of a tree's few rows over grouped keys and values, without a copy of these for every query head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "afterburner_tree"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa`, which repeats keys and values for every query head as soon as there is a mask.

    The copy grows with the context and is made in every layer.  On a CPU the fused kernel takes grouped heads with a
    mask; elsewhere it falls back to unfused arithmetic, so there nothing changes.
    """
    grouped = key.shape[1] != query.shape[1]
    if attention_mask is None or query.device.type != "cpu" or not grouped or kwargs.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    ALL_ATTENTION_FUNCTIONS[NAME] = _attention
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """Inside, a model that attends by `sdpa` does so without repeating keys and values."""
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        yield
        return
    _register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
