"""Retaining heads: what a token's own query, key and value say of how much it will be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from modules.contracts import TokenSelector
from modules.kv_host import AttentionSite, HeldUnits, NewTokens
from modules.locret.config import LocretConfig


class RetainingHead(nn.Module):
    """One layer's head: linear, activation, linear, without biases."""

    def __init__(self, config: LocretConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.feature_width, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.kv_heads, bias=False)
        self.activation = ACT2FN[config.activation]

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B, T, H] of tokens [B, T, F]; higher stays."""
        scores: Tensor = self.fc2(self.activation(self.fc1(features.to(self.fc1.weight.dtype))))
        return scores


class RetainingHeads(nn.Module):
    """A head for every attention layer.

    Shapes: B sequences, T tokens, H KV heads, F width of query, key and value side by side.
    Source: Huang et al. 2024, arXiv:2410.01805.
    """

    def __init__(self, config: LocretConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(RetainingHead(config) for _ in range(config.num_layers))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """Scores [B, T, H] of a layer's tokens.

        Args:
            features: [B, T, F], queries, keys and values from before rotation, in this order.
        """
        return cast(Tensor, self.layers[layer](features))

    def check(self, sites: Sequence[AttentionSite]) -> None:
        """Raise ValueError, naming what differs, unless the heads fit a model with these attention layers."""
        config, site = self.config, sites[0]
        here = {
            "num_layers": len(sites),
            "query_heads": site.query_heads,
            "kv_heads": site.kv_heads,
            "head_dim": site.head_dim,
        }
        different = [f"{name} {getattr(config, name)} (here {value})" for name, value in here.items()
                     if getattr(config, name) != value]  # fmt: skip
        if different:
            raise ValueError(
                f"these retaining heads were made for {', '.join(different)}: load the adapter made for this backbone"
            )


class LocretSelector(TokenSelector):
    """Retaining heads at work: a token's scores are taken when it enters and never change."""

    causal = needs_features = True

    def __init__(self, heads: RetainingHeads) -> None:
        self.heads = heads

    def check(self, sites: Sequence[AttentionSite]) -> None:
        """See `TokenSelector`."""
        self.heads.check(sites)

    @torch.no_grad()
    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """See `TokenSelector`."""
        features = cast(Any, new.features)
        scores: Tensor = self.heads(features, new.layer).transpose(1, 2).float()
        return scores

    def memory_bytes(self) -> int:
        """See `TokenSelector`."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.heads.parameters())
