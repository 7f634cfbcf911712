"""A cache layer with room to grow: appending copies the new rows alone, not everything that came before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_LEAST = 64  # rows of room beyond what is held, or a quarter of that


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """transformers' `DynamicLayer`, whose `torch.cat` moves the whole cache at every step, appending in place.

    `keys` and `values` [B, H, T, D] are views of larger tensors; who puts others in their place may.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor | None] = [None, None]

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer with the rows of another one."""
        grown = cls()
        grown.__dict__.update(layer.__dict__)
        return grown

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends rows [B, H, t, D]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets everything, the room too."""
        super().reset()
        self._rooms = [None, None]

    def _append(self, which: int, held: Tensor, rows: Tensor) -> Tensor:
        length = held.shape[-2] if held.dim() == 4 else 0
        total, room = length + rows.shape[-2], self._rooms[which]
        if room is None or not _fits(room, rows, total) or (length and not _begins(room, held)):
            with torch.inference_mode(False):  # a cache outlives the decoding that makes it
                room = rows.new_empty(*rows.shape[:-2], total + max(_LEAST, total // 4), rows.shape[-1])
            if length:
                room.narrow(-2, 0, length).copy_(held)
            self._rooms[which] = room
        room.narrow(-2, length, rows.shape[-2]).copy_(rows)
        return room.narrow(-2, 0, total)


def give_room(cache: DynamicCache) -> DynamicCache:
    """Lets the layers of a dynamic cache grow in place, but for those that keep a window only; returns the cache."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer.of(layer)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def _fits(room: Tensor, rows: Tensor, total: int) -> bool:
    return room.shape[:2] == rows.shape[:2] and room.shape[-2] >= total


def _begins(room: Tensor, held: Tensor) -> bool:
    return room.data_ptr() == held.data_ptr() and room.stride() == held.stride() and len(room) == len(held)
