"""Keeping the accepted rows of a verification in transformers' caches.

A step appends the rows of its tree to every layer; the accepted ones move to where plain decoding would have put them,
and the others are dropped.  Keys are already rotated by position, and the i-th node of a path has the position of
the column that it moves to, so moving is all there is to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from modules.decode_host.growing import GrowingLayer, give_room

LAYERS = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def prepare_cache(cache: Any, length: int) -> int | None:
    """Makes a cache ready for trees, before the prompt runs.

    Sliding-window layers of an empty dynamic cache become full ones, which the masks restrict to the window: rejected
    rows would push committed ones out.  They take the memory of full attention then.  Layers of a dynamic cache get
    room to grow, so that a step copies its own rows alone.

    Args:
        length: most rows that will be committed.
    Returns:
        Rows that fit, None for any number.
    Raises:
        ValueError: a cache that cannot give single rows back, or is too short.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        kind = "none" if cache is None else f"an offloaded {type(cache).__name__}"
        raise ValueError(f"drafted decoding keeps its rows in a dynamic or static cache, and this one is {kind}")
    if type(cache) is DynamicCache:
        empty = cache.get_seq_length() == 0
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicSlidingWindowLayer and empty:
                cache.layers[index] = GrowingLayer()
        give_room(cache)
    for layer in cache.layers:
        if type(layer) not in LAYERS and hasattr(layer, "keys"):
            raise ValueError(
                f"drafted decoding has to drop rejected rows, which a {type(layer).__name__} cannot: "
                "use a dynamic or static cache, or plain decoding"
            )
    rooms = [room for room in map(_room, cache.layers) if room is not None]
    if rooms and min(rooms) < length:
        raise ValueError(
            f"the cache holds {min(rooms)} rows and {length} are needed: make it longer, or for layers with a sliding "
            "window use the default dynamic cache"
        )
    return min(rooms, default=None)


def _room(layer: Any) -> int | None:
    if isinstance(layer, StaticLayer):
        return int(layer.max_cache_len)
    # A sliding layer that was filled by someone else drops rows as soon as it holds a window's length.
    return int(layer.sliding_window) - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None


def keep_rows(cache: Cache, columns: int, lengths: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
    """Moves the accepted rows to the end of each sequence's committed ones.

    Column t of a sequence then holds token t, as in plain decoding; columns past a sequence's length hold nothing
    of use.

    Args:
        columns: where the rows of the step begin; no growing sequence is longer.
        lengths: committed length of each sequence.
        paths: of each sequence, the nodes to keep in order; empty for one that has ended.
    """
    if _in_place(columns, lengths, paths):
        return
    move = _Move(columns, lengths, paths)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = move(layer.keys), move(layer.values)


def set_columns(cache: Cache, columns: int) -> None:
    """Drops all columns from this one on; the next step's rows come there."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            _set_length(layer, columns)


def _in_place(columns: int, lengths: Sequence[int], paths: Sequence[Sequence[int]]) -> bool:
    return all(
        not path or (length == columns and path[-1] == len(path) - 1)
        for length, path in zip(lengths, paths, strict=True)
    )


class _Move:
    """Moves rows within the columns of a tensor [B, H, columns, D], in place."""

    def __init__(self, columns: int, lengths: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        if len(paths) == 1:  # what is in place already stays
            placed = sum(node == place for place, node in enumerate(paths[0]))
            lengths, paths = [lengths[0] + placed], [paths[0][placed:]]
        longest = max(map(len, paths))
        # Shorter paths are filled up: what is written past a sequence's length is never looked at.
        self.source = [[columns + node for node in (*path, *[0] * (longest - len(path)))] for path in paths]
        self.target = [
            [length + i for i in range(longest)] if path else [columns] * longest
            for length, path in zip(lengths, paths, strict=True)
        ]
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.device not in self._on:
            self._on[rows.device] = (
                torch.tensor(self.source, device=rows.device),
                torch.tensor(self.target, device=rows.device),
            )
        source, target = self._on[rows.device]
        if len(source) == 1:
            rows.narrow(2, self.target[0][0], source.shape[1]).copy_(rows.index_select(2, source[0]))
            return rows
        batch, heads, _, width = rows.shape
        shape = (batch, heads, source.shape[1], width)
        picked = rows.gather(2, source[:, None, :, None].expand(shape))
        return rows.scatter_(2, target[:, None, :, None].expand(shape), picked)


def _set_length(layer: Any, length: int) -> None:
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.fill_(length)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = length
        return
    layer.keys, layer.values = layer.keys.narrow(2, 0, length), layer.values.narrow(2, 0, length)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
