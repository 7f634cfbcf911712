"""The candidates of an evaluation and the rows of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["baseline", "adapter", "untrained", "plain", "peer"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run the pipeline.

    Attributes:
        name: unique in a report, as the table shows it.
        kind: baseline (everything is compared with it), adapter, untrained (parameter-free members of the adapter's
            family), plain (the same sampler with fewer steps), peer (somebody else's trained module).
        enter: sets the shared pipeline up, yields the keyword arguments of the call, and undoes it on leaving.  It is
            entered once per timed call, outside the clock, so it should hold what is costly to make.
        group: cases of one group are one method at several settings; the verdict picks among them.  Default: the name.
        counted: modules outside the backbone whose work counts too, asked for after entering.
    """

    name: str
    kind: Kind
    enter: Callable[[], AbstractContextManager[dict[str, Any]]]
    group: str = ""
    counted: Callable[[], Iterable[nn.Module]] = tuple


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one case.

    Attributes:
        speedup: median over the rounds of baseline seconds / own seconds of the same round.
        speedup_range: lowest and highest of those ratios.
        latency_s: median seconds of one call on the timing batch.
        work: executed work per image, over all batches that the quality is from.
        memory_bytes: see `trainers.timing.peak_memory`.
        quality: by metric, over all held-out inputs.
        samples: the first images [N, C, H, W] in -1..1 on the CPU, for the sample grid.
    """

    name: str
    kind: Kind
    speedup: float
    speedup_range: tuple[float, float]
    latency_s: float
    work: dict[str, float]
    memory_bytes: int
    quality: dict[str, float]
    group: str = ""
    samples: Tensor | None = field(default=None, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The row as `report.json` holds it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "speedup": self.speedup,
            "speedup_range": list(self.speedup_range),
            "latency_s": self.latency_s,
            "work": self.work,
            "memory_bytes": self.memory_bytes,
            "quality": self.quality,
        }
