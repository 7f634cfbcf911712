"""Folding value bases into the model: `W_v U` makes stored values at once, `U^T W_o` takes averages of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modules.kv_host import AttentionSite
from modules.kv_host.interface import Probe, set_probe
from modules.kv_host.projection import ProjectionCodec
from modules.kv_host.units import PackedValues
from modules.lora import weight_with_lora


class MergedValues:
    """Value and output projections of a model, replaced by narrower ones.

    Exact: values are averaged in any coordinates, and the output projection is linear.  Means become biases.  Keys
    cannot be merged, for they are rotated first.
    """

    def __init__(self, sites: Sequence[AttentionSite], codec: ProjectionCodec) -> None:
        """Replaces them.

        Raises:
            ValueError: a layer makes query, key and value in one projection.
        """
        if any(len(site.projections) != 3 for site in sites):
            raise ValueError("this model makes query, key and value in one projection, whose values cannot be narrowed")
        self._sites = sites
        self._own = [(site.module.v_proj, site.module.o_proj) for site in sites]
        self.packed: dict[int, PackedValues] = {}
        for site in sites:
            layer = site.index
            bases = [codec.values[layer, head, :, :rank] for head, rank in enumerate(codec.ranks[layer][1])]
            self.packed[layer] = PackedValues(tuple(codec.ranks[layer][1]))
            module = cast(Any, site.module)
            value, output = _narrowed(site, module.v_proj, module.o_proj, bases, codec.means[layer])
            set_probe(module, _probe(site, bases, codec.means[layer], self.packed[layer]))
            module.v_proj, module.o_proj = value, output

    def undo(self) -> None:
        """Gives the model its own projections back."""
        for site, (value, output) in zip(self._sites, self._own, strict=True):
            set_probe(site.module, None)
            cast(Any, site.module).v_proj, cast(Any, site.module).o_proj = value, output


@torch.no_grad()
def _narrowed(
    site: AttentionSite, value: Any, output: Any, bases: Sequence[Tensor], means: Tensor
) -> tuple[nn.Linear, nn.Linear]:
    """The two projections, computed in float64 and rounded once."""
    size, share = site.head_dim, site.query_heads // site.kv_heads
    weight, dtype = weight_with_lora(value).double().view(site.kv_heads, size, -1), value.weight.dtype
    bias = -means.double() if value.bias is None else value.bias.double().view(-1, size) - means.double()
    rows = torch.cat([basis.double().T @ weight[head] for head, basis in enumerate(bases)])
    biases = torch.cat([bias[head] @ basis.double() for head, basis in enumerate(bases)])
    missing = -len(rows) % size
    narrow = _linear(nn.functional.pad(rows, (0, 0, 0, missing)), nn.functional.pad(biases, (0, missing)), dtype)
    columns = weight_with_lora(output).double().view(-1, site.query_heads, size)  # [D, H_q, d]
    merged = [columns[:, head] @ bases[head // share].double() for head in range(site.query_heads)]
    added = torch.einsum("ohd,hd->o", columns, means.double().repeat_interleave(share, dim=0))
    whole = added if output.bias is None else output.bias.double() + added
    return narrow, _linear(torch.cat(merged, dim=1), whole, dtype)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def _probe(site: AttentionSite, bases: Sequence[Tensor], means: Tensor, packed: PackedValues) -> Probe:
    """Attention of calls without a cache of ours: stored coordinates at full width and back."""
    share = site.query_heads // site.kv_heads

    def probe(query: Tensor, key: Tensor, value: Tensor) -> Any:
        wide = [each @ basis.to(each.dtype).T for each, basis in zip(packed.unpacked(value), bases, strict=True)]

        def after(out: Tensor) -> Tensor:
            narrow = [out[:, :, head] @ bases[head // share].to(out.dtype) for head in range(site.query_heads)]
            return torch.cat(narrow, dim=-1)[:, :, None]

        return query, key, torch.stack(wide, dim=1), after

    return probe
