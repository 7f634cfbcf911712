"""What it takes to rebuild projections, and which ranks they are used at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from modules.kv_host.projection import Ranks


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig:
    """The adapter's "module" entry.

    Attributes:
        num_layers, kv_heads, head_dim: of the backbone.
        interval: ranks are multiples of it.
        budget: name of the table in `ranks` that is used unless told otherwise.
        ranks: by budget, as a share of the width ("0.5"), the ranks of every layer: [[keys'], [values']].
        rope: kind of the rotary embedding, after which keys are projected.
        post_rope: keys are projected after their rotation.
        lora: PEFT's settings of what was trained of the backbone itself beside the projections, or None.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    interval: int
    budget: str = "0.5"
    ranks: dict[str, Any] = field(default_factory=dict)
    rope: str = "default"
    post_rope: bool = True
    lora: dict[str, Any] | None = None

    def table(self, budget: float | str) -> Ranks:
        """The ranks of a budget; `1.0` or `full` is full rank.

        Raises:
            ValueError: the adapter has no such table.
        """
        name = budget if isinstance(budget, str) else f"{budget:g}"
        if name in ("full", "1"):
            full = (self.head_dim,) * self.kv_heads
            return ((full, full),) * self.num_layers
        if name not in self.ranks:
            raise ValueError(
                f"this adapter has no ranks for the budget {name}: it has {', '.join(sorted(self.ranks))} and full"
            )
        return tuple((tuple(keys), tuple(values)) for keys, values in self.ranks[name])
