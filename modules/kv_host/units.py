"""The units that a cache layer holds: keys and values as a codec stores them, and what is known of each unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

NOT_TEXT = -(2**30)
"""Position of a unit that only fills a row up."""


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one layer that are stored with the same widths.

    heads: their numbers.
    key_basis: [h, d, r_K], orthonormal columns; None stores keys as they are.
    value_basis: [h, d, r_V]; None stores values as they are.
    value_mean: [h, d], taken off before projecting and put back after.
    """

    heads: tuple[int, ...]
    key_basis: Tensor | None = None
    value_basis: Tensor | None = None
    value_mean: Tensor | None = None

    def widths(self) -> tuple[int | None, int | None]:
        """Stored widths of keys and values, None where they are stored as they are."""
        key, value = (None if basis is None else int(basis.shape[2]) for basis in (self.key_basis, self.value_basis))
        return key, value

    def of(self, states: Tensor) -> Tensor:
        """These heads of all heads' [B, H, ...]: a view where they lie side by side."""
        first, last = self.heads[0], self.heads[-1]
        if self.heads == tuple(range(first, last + 1)):
            return states[:, first : last + 1]
        return states[:, list(self.heads)]

    def encode(self, keys: Tensor, values: Tensor, packed: PackedValues | None = None) -> tuple[Tensor, Tensor]:
        """All heads' [B, H, T, d] to this group's [B, h, T, r_K] and [B, h, T, r_V].

        Args:
            packed: values are in their stored coordinates already.
        """
        keys = _project(self.of(keys), self.key_basis)
        if packed is not None:
            each = packed.unpacked(values)
            return keys, torch.stack([each[head] for head in self.heads], dim=1)
        values = self.of(values)
        if self.value_mean is not None:
            values = values - self.value_mean[:, None].to(values.dtype)
        return keys, _project(values, self.value_basis)

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of them at full width."""
        return _expand(keys, self.key_basis), self.restore(values)

    def restore(self, values: Tensor) -> Tensor:
        """Values, or averages of values, [B, h, T, r_V] at full width."""
        values = _expand(values, self.value_basis)
        return values if self.value_mean is None else values + self.value_mean[:, None].to(values.dtype)


def _project(states: Tensor, basis: Tensor | None) -> Tensor:
    return states if basis is None else states @ basis.to(states.dtype)


def _expand(states: Tensor, basis: Tensor | None) -> Tensor:
    return states if basis is None else states @ basis.to(states.dtype).transpose(1, 2)


@dataclass(frozen=True)
class Units:
    """N units of each of H heads.

    parts: by group, keys [B, h, N, r_K] and values [B, h, N, r_V].
    scores: [B, H, N], the selector's; None where it keeps none.
    positions: int32 [B, H, N], each unit's place in its text, NOT_TEXT for filling; None where nobody asks.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    scores: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return int(self.parts[0][0].shape[2])

    def tensors(self) -> list[Tensor]:
        """Everything that is stored."""
        extra = [tensor for tensor in (self.scores, self.positions) if tensor is not None]
        return [tensor for part in self.parts for tensor in part] + extra

    def memory_bytes(self) -> int:
        """Bytes of the storages behind the tensors."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def _each(self, groups: Sequence[HeadGroup], change: Callable[[Tensor, Sequence[int] | None], Tensor]) -> Self:
        parts = tuple(
            (change(keys, group.heads), change(values, group.heads))
            for group, (keys, values) in zip(groups, self.parts, strict=True)
        )
        scores, positions = (None if t is None else change(t, None) for t in (self.scores, self.positions))
        return replace(self, parts=parts, scores=scores, positions=positions)

    def rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same change along the batch of every tensor."""
        return self._each([HeadGroup(())] * len(self.parts), lambda tensor, _: change(tensor))

    def owned(self) -> Units:
        """The same units in storages of their own size, which nothing else looks at."""
        return self.rows(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def joined(self, new: Units) -> Units:
        """These units, then the new ones."""
        pairs = zip(self.parts, new.parts, strict=True)
        parts = tuple((torch.cat([k, kn], dim=2), torch.cat([v, vn], dim=2)) for (k, v), (kn, vn) in pairs)
        scores, positions = (
            None if one is None or other is None else torch.cat([one, other], dim=2)
            for one, other in ((self.scores, new.scores), (self.positions, new.positions))
        )
        return Units(parts, scores, positions)

    def picked(self, index: Tensor, groups: Sequence[HeadGroup]) -> Units:
        """Units [B, H, k] by their numbers, in that order, in storages of their own."""

        def pick(tensor: Tensor, heads: Sequence[int] | None) -> Tensor:
            chosen = index if heads is None else index[:, list(heads)]
            if tensor.dim() == 4:
                return tensor.gather(2, chosen[..., None].expand(-1, -1, -1, tensor.shape[3]))
            return tensor.gather(2, chosen)

        return self._each(groups, pick)

    def replaced(self, leaving: Tensor, new: Units, coming: Tensor, groups: Sequence[HeadGroup]) -> Units:
        """Writes new units over those that leave, in place: as many come as leave, in every head.

        Args:
            leaving: bool [B, H, N].  coming: bool [B, H, T], of the new units.
        """

        def write(old: Tensor, fresh: Tensor, heads: Sequence[int] | None) -> None:
            rows = slice(None) if heads is None else list(heads)
            old[leaving[:, rows]] = fresh[coming[:, rows]]

        for group, (keys, values), (new_keys, new_values) in zip(groups, self.parts, new.parts, strict=True):
            write(keys, new_keys, group.heads)
            write(values, new_values, group.heads)
        for mine, theirs in ((self.scores, new.scores), (self.positions, new.positions)):
            if mine is not None and theirs is not None:
                write(mine, theirs, None)
        return self


def attend(
    query: Tensor, units: Units, groups: Sequence[HeadGroup], visible: Tensor | None, scaling: float
) -> list[Tensor]:
    """Attention in the stored coordinates, at really the stored widths.

    The query heads of a KV head are rows of one product, so keys and values are never repeated.

    Args:
        query: [B, H g, T, d].
        visible: bool [B or 1, H or 1, T, N]; None where every query sees every unit.
    Returns:
        by group, averages of the stored values [B, h, g T, r_V].
    """
    batch, query_heads, tokens, size = query.shape
    heads = sum(len(group.heads) for group in groups)
    share = query_heads // heads
    rows_of_heads = query.reshape(batch, heads, share * tokens, size)
    outputs = []
    for group, (keys, values) in zip(groups, units.parts, strict=True):
        mask = visible
        if mask is not None:
            mask = mask if mask.shape[1] == 1 else group.of(mask)
            mask = mask[:, :, None].expand(-1, -1, share, -1, -1).flatten(2, 3)
        own = _project(group.of(rows_of_heads), group.key_basis)
        outputs.append(_averages(own, keys, values, mask, scaling, tokens))
    return outputs


def _averages(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, tokens: int) -> Tensor:
    """Attention of a group.

    On a CPU torch's is fused for keys and values of one width only; of two it copies both and holds all scores.
    """
    rank, wide = values.shape[3], max(keys.shape[3], values.shape[3])
    if keys.is_cuda or keys.shape[3] == rank:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    if tokens == 1:  # two products over what is stored
        scores = (query * scaling) @ keys.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values
    # The narrower of both is filled up with zeros while this call lasts.
    query, keys, values = (functional.pad(one, (0, wide - one.shape[3])) for one in (query, keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)[..., :rank]


def restored(outputs: Sequence[Tensor], groups: Sequence[HeadGroup], share: int) -> Tensor:
    """What `attend` gave, at full width: [B, T, H g, d]."""
    parts = [group.restore(out) for group, out in zip(groups, outputs, strict=True)]
    order = [head for group in groups for head in group.heads]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if order != sorted(order):
        out = out[:, torch.tensor(order, device=out.device).argsort()]
    batch, heads, rows, size = out.shape
    return out.reshape(batch, heads * share, rows // share, size).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class PackedValues:
    """Values that their projection itself has put into stored coordinates, those of all KV heads side by side.

    transformers cuts a projection's output into heads of d, so it is filled up to whole ones.

    ranks: of each KV head.
    """

    ranks: tuple[int, ...]

    def unpacked(self, values: Tensor) -> list[Tensor]:
        """[B, m, T, d] as the model cut them, to [B, T, r] of each KV head."""
        flat = values.transpose(1, 2).flatten(2)[..., : sum(self.ranks)]
        return list(torch.split(flat, list(self.ranks), dim=-1))

    def packed(self, outputs: Sequence[Tensor], groups: Sequence[HeadGroup], share: int) -> Tensor:
        """What `attend` gave, side by side by query head: [B, T, 1, sum of g r]."""
        by_head: dict[int, Tensor] = {}
        for group, out in zip(groups, outputs, strict=True):
            batch, heads, rows, rank = out.shape
            each = out.reshape(batch, heads, share, rows // share, rank).transpose(2, 3).flatten(3)  # [B, h, T, g r]
            by_head |= {head: each[:, i] for i, head in enumerate(group.heads)}
        return torch.cat([by_head[head] for head in sorted(by_head)], dim=-1)[:, :, None]
