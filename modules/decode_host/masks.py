"""Attention masks of a tree behind a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.decode_host.tree import TreeTables

IMPLEMENTATIONS = ("eager", "sdpa")  # flex attention crashes on a dense mask (torch 2.13, CPU)


def windows_of(config: Any) -> dict[str, int | None]:
    """Attention window in tokens by kind of layer, None for full attention; a model with one kind calls it "".

    Follows how transformers' models choose their masks.

    Raises:
        ValueError: attention that cannot take a mask of ours.
    """
    config = config.get_text_config(decoder=True)
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {config._attn_implementation!r} takes no tree mask: load the model with "
            f"attn_implementation={' or '.join(map(repr, IMPLEMENTATIONS))}"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [""]
    known = {"": window, "full_attention": None, "sliding_attention": window}
    strange = set(kinds) - known.keys()
    if strange or getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"layers of kind {sorted(strange) or 'chunked_attention'} keep no state that single rows can be taken "
            "from: drafted decoding needs full or sliding-window attention"
        )
    return {kind: known[kind] for kind in kinds}


_KEPT = 64  # trees whose masks are kept


class TreeMasks:
    """Additive masks [B or 1, 1, M, columns + M] for trees of M nodes, in the backbone's dtype.

    Additive because eager attention takes a boolean mask for numbers, and sdpa would convert one in every layer.
    """

    def __init__(self, windows: dict[str, int | None], prompt: Tensor | None, dtype: torch.dtype) -> None:
        """`prompt`: [B, T], which columns of the prompt are tokens; None where all are."""
        self.windows, self.prompt, self.dtype = windows, prompt, dtype
        self._free = torch.zeros(0)
        self._trees: dict[tuple[int, int | None], tuple[TreeTables, Tensor]] = {}

    def build(
        self, tables: TreeTables, lengths: Sequence[int], columns: int, widths: Mapping[bool, int | None]
    ) -> Tensor | dict[str, Tensor] | None:
        """The mask of a step, by kind of layer where the model has several.

        None for single tokens that see everything, which is plain decoding bit for bit.

        Args:
            lengths: committed length of each sequence, of `columns` columns at most.
            widths: columns of static layers without and with a window; None where the tree's rows come last.
        """
        even = self.prompt is None and all(length == columns for length in lengths)
        if even and tables.depth.shape[1] == 1 and not any(widths.values()):
            return None
        masks = {
            kind: self._mask(tables, lengths, columns, widths.get(window is not None), window)
            for kind, window in self.windows.items()
        }
        return masks if "" not in masks else masks[""]

    def _mask(
        self, tables: TreeTables, lengths: Sequence[int], columns: int, width: int | None, window: int | None
    ) -> Tensor:
        tree = self._tree(tables, window)
        parts = [self._committed(tables, lengths, columns, window), tree]
        size, nodes = max(parts[0].shape[0], tree.shape[0]), tree.shape[2]
        if width is not None:
            hidden = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=tree.device)
            parts.append(hidden.expand(1, 1, 1, width - columns - nodes))
        return torch.cat([part.expand(size, 1, nodes, -1) for part in parts], dim=-1)

    def _tree(self, tables: TreeTables, window: int | None) -> Tensor:
        key = id(tables), window
        if key not in self._trees:
            seen = tables.ancestors
            if window is not None:
                seen = seen & (tables.depth[:, :, None] - tables.depth[:, None, :] < window)
            if len(self._trees) >= _KEPT:
                self._trees.clear()
            self._trees[key] = tables, self._additive(seen)[:, None]  # with its tables, whose id no other then has
        return self._trees[key][1]

    def _committed(self, tables: TreeTables, lengths: Sequence[int], columns: int, window: int | None) -> Tensor:
        device = tables.depth.device
        outside = window is not None and columns + tables.path.shape[2] > window
        if self.prompt is None and not outside and all(length == columns for length in lengths):
            if self._free.numel() < columns:
                self._free = torch.zeros(1, 1, 1, 2 * columns, dtype=self.dtype, device=device)
            return self._free[..., :columns]
        length = torch.tensor(lengths, device=device)[:, None, None]
        column = torch.arange(columns, device=device)
        seen = column < length
        if self.prompt is not None:
            prompt = torch.nn.functional.pad(self.prompt, (0, columns - self.prompt.shape[1]), value=True)
            seen = seen & prompt[:, None]
        if window is not None:
            seen = seen & (length + tables.depth[:, :, None] - column < window)
        return self._additive(seen)[:, None]

    def _additive(self, seen: Tensor) -> Tensor:
        zeros = torch.zeros((), dtype=self.dtype, device=seen.device)
        return torch.where(seen, zeros, torch.finfo(self.dtype).min)
