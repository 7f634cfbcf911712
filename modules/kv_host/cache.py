"""The whole cache: a layer of ours for every attention layer, with one setting for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from modules.contracts import Codec, TokenSelector
from modules.kv_host.layer import KVLayer
from modules.kv_host.policy import CachePolicy, PrefillStep
from modules.kv_host.roles import AttentionSite, FeatureTap
from modules.kv_host.units import HeadGroup, PackedValues


@dataclass
class Setting:
    """What the layers of a cache have in common.

    Attributes:
        groups: by layer, how its heads are stored.
        taps: by layer, where features come from; empty where the selector needs none.
        frequencies: of the rotary embedding, for compact places.
        packed: by layer, how merged projections lay values out; empty where none are merged.
        needs_positions: whether units keep their places in the text even where all are text.
        step: the part of a prompt that is being read, None while decoding.
    """

    policy: CachePolicy
    selector: TokenSelector | None
    groups: Sequence[tuple[HeadGroup, ...]]
    taps: Mapping[int, FeatureTap] = field(default_factory=dict)
    frequencies: Tensor = field(default_factory=lambda: torch.zeros(0))
    packed: Mapping[int, PackedValues] = field(default_factory=dict)
    needs_positions: bool = False
    step: PrefillStep | None = None

    @property
    def in_place(self) -> bool:
        """Whether what stays may lie in any order, so that newcomers take the places of those who leave."""
        any_order = self.policy.positions == "original" and not self.policy.ordered
        return any_order and self.selector is not None and self.selector.causal


class KVCache(Cache):  # type: ignore[misc]
    """A cache that holds what its selector chose, as its codec stores it; goes into `past_key_values=`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(layers=[KVLayer(index, setting) for index in range(len(setting.groups))])
        self.setting = setting
        self.layers: list[KVLayer]

    def units(self) -> list[int]:
        """Units per head that each layer holds."""
        return [len(layer) for layer in self.layers]

    def peak_units(self) -> list[int]:
        """Most units per head that each layer ever held."""
        return [layer.peak for layer in self.layers]

    def memory_bytes(self) -> int:
        """Bytes of everything held: the sum over the storages of its tensors."""
        return sum(layer.units.memory_bytes() for layer in self.layers if layer.units is not None)

    def layout(self) -> list[list[tuple[tuple[int, ...], int | None, int | None]]]:
        """By layer and group: its heads, and stored widths of keys and values, None for full ones."""
        return [[(group.heads, *group.widths()) for group in groups] for groups in self.setting.groups]

    def resumed(self, setting: Setting) -> KVCache:
        """A cache that goes on from here under another setting; what is read into it is not read into this one."""
        other = KVCache(setting)
        for mine, theirs in zip(other.layers, self.layers, strict=True):
            mine.units = None if theirs.units is None else theirs.units.rows(torch.clone)
            mine.seen, mine.peak, mine.generated = theirs.seen, theirs.peak, theirs.generated
            mine.memory, mine.is_initialized = dict(theirs.memory), theirs.is_initialized
        return other

    def stretch(self, length: int) -> None:
        """Holds as much as behind a text of `length` tokens: what it has, again and again, in storages of their own.

        For measuring time and bytes, which depend on sizes and not on what is held.
        """
        policy = self.setting.policy
        for layer in self.layers:
            assert layer.units is not None  # something has been read
            budget = policy.budget_of(layer.index) if self.setting.selector is not None else None
            count = length if budget is None else min(budget + policy.local, length)
            layer.units = layer.units.rows(partial(repeated, count=count))
            layer.seen = length

    def read_to(self, columns: int) -> None:
        """The text is so many columns long, whatever was filled up while it was read."""
        for layer in self.layers:
            layer.seen = columns


def repeated(states: Tensor, count: int) -> Tensor:
    """[B, H, N, ..] to [B, H, count, ..], from the first unit on again when there are no more."""
    index = torch.arange(count, device=states.device) % states.shape[2]
    return states.index_select(2, index)


def plain_groups(site: AttentionSite, codec: Codec | None) -> tuple[HeadGroup, ...]:
    """How a layer's heads are stored.

    Raises:
        ValueError: the codec leaves a head out, or names one twice.
    """
    everything = tuple(range(site.kv_heads))
    if codec is None:
        return (HeadGroup(everything),)
    groups = tuple(codec.groups(site.index))
    if tuple(sorted(head for group in groups for head in group.heads)) != everything:
        raise ValueError(f"layer {site.index} has {site.kv_heads} KV heads, and its codec stores {groups}")
    return groups


def empty_cache(
    sites: Sequence[AttentionSite],
    policy: CachePolicy,
    selector: TokenSelector | None,
    codec: Codec | None,
    **settings: Any,
) -> KVCache:
    """A cache for these layers."""
    groups = [plain_groups(site, codec) for site in sites]
    return KVCache(Setting(policy, selector, groups, **settings))
