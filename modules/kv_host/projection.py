"""Keys and values in fewer coordinates of an orthonormal basis: PCA, and whatever else gives a basis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.contracts import Codec
from modules.kv_host.interface import Probe, probing
from modules.kv_host.roles import AttentionSite
from modules.kv_host.units import HeadGroup

Ranks = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""By layer, the ranks of every KV head's keys and of its values."""


def uniform_ranks(sites: Sequence[AttentionSite], rank: int) -> Ranks:
    """The same rank everywhere."""
    return tuple(((rank,) * site.kv_heads, (rank,) * site.kv_heads) for site in sites)


class ProjectionCodec(Codec):
    """The first coordinates of keys and values in a basis per KV head.

    Shapes: L layers, H KV heads, d head size.
    Key means are not taken off: what they add to a query's logits is the same for every key, and softmax drops it.
    """

    def __init__(self, keys: Tensor, values: Tensor, means: Tensor, ranks: Ranks) -> None:
        """
        Args:
            keys, values: orthonormal bases [L, H, d, d], the most important column first.
            means: of the values, [L, H, d].
            ranks: see `Ranks`; heads at full rank are stored as they are.
        """
        self.keys, self.values, self.means = keys, values, means
        self.use(ranks)

    def use(self, ranks: Ranks) -> None:
        """Other ranks, for the caches that are made from now on.

        Raises:
            ValueError: they are not for these layers and heads, or outside 1..d.
        """
        layers, heads, size, _ = self.keys.shape
        flat = [rank for layer in ranks for side in layer for rank in side]
        if [len(side) for layer in ranks for side in layer] != [heads] * (2 * layers) or not all(
            1 <= rank <= size for rank in flat
        ):
            raise ValueError(
                f"the ranks name {len(ranks)} layers and values of {min(flat, default=0)} to {max(flat, default=0)}: "
                f"give 1 to {size} for the keys and the values of {heads} heads in each of {layers} layers"
            )
        self.ranks = ranks
        self._groups = [self._grouped(layer) for layer in range(layers)]

    @property
    def share(self) -> float:
        """Coordinates stored, of all."""
        size = self.keys.shape[2]
        flat = [rank for layer in self.ranks for side in layer for rank in side]
        return sum(flat) / (len(flat) * size)

    def groups(self, layer: int) -> Sequence[HeadGroup]:
        """See `Codec`."""
        return self._groups[layer]

    def check(self, sites: Sequence[AttentionSite]) -> None:
        """See `Codec`."""
        here = (len(sites), sites[0].kv_heads, sites[0].head_dim)
        made = tuple(self.keys.shape[:3])
        for name, mine, theirs in zip(("num_layers", "kv_heads", "head_dim"), made, here, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"these projections were made for {name} {mine} (here {theirs}): load the adapter made for this "
                    "backbone"
                )

    def memory_bytes(self) -> int:
        """See `Codec`: what is really used of the bases."""
        parts = [
            tensor
            for groups in self._groups
            for group in groups
            for tensor in (group.key_basis, group.value_basis, group.value_mean)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in parts if tensor is not None)

    def _grouped(self, layer: int) -> tuple[HeadGroup, ...]:
        size = self.keys.shape[2]
        members: dict[tuple[int, int], list[int]] = {}
        for head, pair in enumerate(zip(*self.ranks[layer], strict=True)):
            members.setdefault(pair, []).append(head)
        groups = []
        for (key_rank, value_rank), heads in members.items():
            groups.append(
                HeadGroup(
                    tuple(heads),
                    None if key_rank == size else self.keys[layer, heads, :, :key_rank].contiguous(),
                    None if value_rank == size else self.values[layer, heads, :, :value_rank].contiguous(),
                    None if value_rank == size else self.means[layer, heads].contiguous(),
                )
            )
        return tuple(groups)


@dataclass(frozen=True)
class Moments:
    """Principal directions of keys and values, see `principal_bases`.

    keys, values: [L, H, d, d], orthonormal columns by falling variance.
    means: of the values, [L, H, d].
    spectra: variances along the columns, [L, 2, H, d], keys' first.
    """

    keys: Tensor
    values: Tensor
    means: Tensor
    spectra: Tensor


@torch.no_grad()
def principal_bases(model: Any, sites: Sequence[AttentionSite], batches: Iterable[dict[str, Any]]) -> Moments:
    """PCA of rotated keys and of values, over every token of some calls of the model.

    Means and second moments are summed in float64.

    Args:
        batches: arguments of the calls, without padding.
    Raises:
        ValueError: there is no batch.
    """
    totals: dict[tuple[int, int], list[Tensor]] = {}
    count = 0

    def add(place: tuple[int, int], states: Tensor) -> None:
        flat = states.double().transpose(0, 1).flatten(1, 2)  # [H, tokens, d]
        sums = [flat.sum(1), flat.transpose(1, 2) @ flat]
        totals[place] = sums if place not in totals else [a + b for a, b in zip(totals[place], sums, strict=True)]

    def look(site: AttentionSite) -> Probe:
        def probe(query: Tensor, key: Tensor, value: Tensor) -> None:
            add((site.index, 0), key)
            add((site.index, 1), value)

        return probe

    with probing(model, {site.module: look(site) for site in sites}):
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
            count += batch["input_ids"].numel()
    if not count:
        raise ValueError("there is no text to take principal directions of")
    found = {place: _directions(sums[0] / count, sums[1] / count) for place, sums in totals.items()}

    def stacked(side: int, part: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor]) -> Tensor:
        return torch.stack([part(found[site.index, side]) for site in sites]).float()

    return Moments(
        stacked(0, lambda one: one[1]),
        stacked(1, lambda one: one[1]),
        stacked(1, lambda one: one[0]),
        torch.stack([stacked(side, lambda one: one[2]) for side in (0, 1)], dim=1),
    )


def _directions(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    variance, vectors = torch.linalg.eigh(square - mean[:, :, None] * mean[:, None, :])
    return mean, vectors.flip(-1), variance.flip(-1).clamp(min=0)
