"""Locret at work in a model: from an adapter's tensors to a cache that stays within its budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts import AdapterEntry
from modules.kv_host import KVHandle
from modules.locret.config import LocretConfig
from modules.locret.heads import LocretSelector, RetainingHeads


class LocretHandle(KVHandle):
    """Retaining heads at work in a model's cache; `handle.use(budget=..)` changes how much is kept.

    Attributes:
        config: the adapter's.
        heads: what scores.
    """

    def __init__(self, model: Any, heads: RetainingHeads) -> None:
        super().__init__(model, LocretSelector(heads), None, heads.config.cache_policy())
        self.config, self.heads = heads.config, heads


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> LocretHandle:
    """Attaches an exported adapter to a causal language model of transformers: its cache stays within the budget.

    Raises:
        ValueError: the adapter does not fit this model.
    """
    if not isinstance(target, nn.Module) or not hasattr(target, "generate"):
        raise ValueError(f"a locret adapter attaches to a causal language model, not to a {type(target).__name__}")
    return LocretHandle(target, heads_of(LocretConfig(**manifest.module), tensors, target))


def heads_of(config: LocretConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> RetainingHeads:
    """Heads with an adapter's tensors, frozen, on the model's device and in its dtype."""
    with torch.device("meta"):  # every value is about to be replaced
        heads = RetainingHeads(config)
    heads.load_state_dict(dict(tensors), assign=True)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return heads.to(device=like.device, dtype=like.dtype).requires_grad_(False).eval()
