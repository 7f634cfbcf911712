"""Trained orthogonal projections: `U = U_pca Cayley(A)`, of which any first columns are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.kv_host import AttentionSite
from modules.kv_host.interface import Probe
from modules.kv_host.projection import Moments


class MatryoshkaProjections(nn.Module):
    """An orthogonal matrix per layer and KV head, for keys and for values, and the values' means.

    Shapes: L layers, H KV heads, d head size; side 0 is keys, 1 values.

    Only the strict lower triangles of skew-symmetric matrices are trained; they start at zero, where the projections
    are those of PCA bit for bit.

    Source: Lin et al. 2024, arXiv:2410.14731.
    Departs from it: the Cayley map is taken around PCA and in float32, not around the identity and in the model's
    dtype; one matrix per KV head, not per query head; no means of keys, which softmax cancels.
    """

    start: Tensor
    start_means: Tensor
    spectra: Tensor
    _places: Tensor

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        layers, heads, size, _ = moments.keys.shape
        self.register_buffer("start", torch.stack([moments.keys, moments.values], dim=1).float())  # [L, 2, H, d, d]
        self.register_buffer("spectra", moments.spectra.float())
        below = torch.tril_indices(size, size, offset=-1)
        self.register_buffer("_places", below[0] * size + below[1], persistent=False)
        self.skew = nn.Parameter(torch.zeros(layers, 2, heads, below.shape[1]))
        self.register_buffer("start_means", moments.means.float())
        self.means = nn.Parameter(moments.means.float().clone())

    @property
    def head_dim(self) -> int:
        """d."""
        return int(self.start.shape[-1])

    def forward(self) -> Tensor:
        """All orthogonal matrices [L, 2, H, d, d], in float32 whatever the autocast."""
        size = self.head_dim
        with torch.autocast(self.skew.device.type, enabled=False):
            flat = self.skew.new_zeros(*self.skew.shape[:3], size * size)
            lower = flat.index_copy(-1, self._places, self.skew).view(*self.skew.shape[:3], size, size)
            half = (lower - lower.transpose(-1, -2)) / 2
            eye = torch.eye(size, device=half.device)
            turn = torch.linalg.solve(eye - half, eye + half)
            bases: Tensor = self.start @ turn
            return bases


def projecting_probe(site: AttentionSite, bases: Tensor, means: Tensor, masks: Tensor) -> Probe:
    """Attention as the truncated cache has it, with gradients: coordinates beyond a rank are zeroed, not cut off.

    Args:
        bases: [2, H, d, d] of this layer.  means: [H, d].
        masks: [2, H, d], 1 where a coordinate is kept.
    """
    share = site.query_heads // site.kv_heads

    def probe(query: Tensor, key: Tensor, value: Tensor) -> Any:
        dtype = query.dtype
        key_basis, value_basis = (bases * masks[:, :, None]).to(dtype)
        mean = means[:, None].to(dtype)
        per_query = key_basis.repeat_interleave(share, dim=0)
        back, centre = value_basis.repeat_interleave(share, dim=0), means.to(dtype).repeat_interleave(share, dim=0)

        def after(out: Tensor) -> Tensor:
            return torch.einsum("bthr,hdr->bthd", out, back) + centre

        return query @ per_query, key @ key_basis, (value - mean) @ value_basis, after

    return probe


def draw_masks(shape: Sequence[int], interval: int, generator: torch.Generator) -> Tensor:
    """Masks [L, 2, H, d]: ranks are drawn from the multiples of `interval`, for every layer, side and head by itself.

    Args:
        shape: (L, 2, H, d).
    """
    size = shape[-1]
    ranks = torch.randint(1, size // interval + 1, tuple(shape[:3]), generator=generator) * interval
    return rank_masks(ranks, size)


def rank_masks(ranks: Tensor, size: int) -> Tensor:
    """Masks [.., d] of ranks [..]."""
    return (torch.arange(size, device=ranks.device) < ranks[..., None]).float()
