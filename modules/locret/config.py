"""What it takes to rebuild retaining heads, and how a cache is cut by them unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modules.kv_host.policy import CachePolicy


@dataclass(frozen=True, kw_only=True)
class LocretConfig:
    """The recipe's `module:` section and the adapter's "module" entry.

    Attributes:
        num_layers, query_heads, kv_heads, head_dim: of the backbone.
        hidden_size: width of a head's inner layer.
        activation: the backbone's own, by transformers' name.
        policy: `CachePolicy` as a dict.
        label: what the heads were taught to say.
        feature_order: of the input, which is what a projection of all three puts out.
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int = 256
    activation: str = "silu"
    policy: dict[str, Any] = field(default_factory=dict)
    label: str = "locret"
    feature_order: str = "qkv"

    @property
    def feature_width(self) -> int:
        """Width of a token's query, key and value side by side."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim

    def cache_policy(self) -> CachePolicy:
        """The policy, checked."""
        values = dict(self.policy)
        if isinstance(values.get("budget"), list):
            values["budget"] = tuple(values["budget"])
        return CachePolicy(**values)
