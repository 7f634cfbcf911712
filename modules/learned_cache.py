"""What learned caches share: operating points on the reuse host, and the sampler that they hold for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts import Granularity, Handle, Predictor
from modules.diffusion_host import attach_reuse
from modules.guards import GuidanceGuard, check_sampler, check_timesteps
from modules.reuse import StepTable


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What the numbers of a learned cache hold for.

    Attributes:
        timesteps: the sampler's, falling.  guidance: the scale.
        sampler: see `modules.guards.sampler_entry`.
        call: further keyword arguments that this backbone's pipeline call needs.
    """

    timesteps: list[int]
    guidance: float
    sampler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OperatingPoint:
    """One balance of speed and quality.

    Attributes:
        table: [T, N] bool, what is computed.
        predictor: makes what stands in for the rest.
    """

    table: Tensor
    predictor: Callable[[], Predictor]

    @property
    def compute(self) -> float:
        """Share of the units that is computed."""
        return float(self.table.float().mean())


class CacheHandle(Handle):
    """A learned cache at work in a transformer.

    Attributes:
        points: its operating points; `default` is the number of the one that is attached.
        reuse: the host's handle; `reuse.peak_bytes` after `reuse.watches_memory = True` is what the cache takes.
    """

    def __init__(
        self, target: Any, sampling: Sampling, points: Sequence[OperatingPoint], default: int, granularity: Granularity
    ) -> None:
        """Raises ValueError where the pipeline's sampler, or the transformer, is not what the points were made for."""
        super().__init__()
        self.sampling, self.points, self.default = sampling, list(points), default
        self.granularity = granularity
        first = points[default]
        pipe = None if isinstance(target, nn.Module) else target
        if pipe is not None:
            check_sampler(sampling.sampler, pipe.scheduler)
        self._guard: GuidanceGuard | None = None
        self.reuse = attach_reuse(target, StepTable(first.table), first.predictor(), granularity)
        try:
            self._check_units(first.table.shape[1])
        except ValueError:
            self.detach()
            raise
        self.clock = self.reuse.clock
        self.clock.on_begin(lambda: check_timesteps(sampling.timesteps, self.clock), first=True)
        self.call_kwargs = {
            **sampling.call,
            "guidance_scale": sampling.guidance,
            "num_inference_steps": len(sampling.timesteps),
        }
        if pipe is None:
            self.clock.begin(len(sampling.timesteps))
        else:
            self._guard = GuidanceGuard(pipe, self.clock, sampling.guidance)

    def _check_units(self, units: int) -> None:
        if units != len(self.reuse.unit_names):
            raise ValueError(
                f"this adapter decides about {units} units but the transformer has {len(self.reuse.unit_names)}: "
                "load the adapter made for this backbone"
            )

    @property
    def shares(self) -> list[float]:
        """Share of computed units of each operating point."""
        return [point.compute for point in self.points]

    def use(self, compute: float) -> float:
        """Goes over to the operating point with the largest share of computed units not above `compute`.

        Args:
            compute: 1 computes everything.
        Returns:
            the share of the point that was taken.
        Raises:
            ValueError: every point computes more.
        """
        if compute >= 1:
            everything = torch.ones_like(self.points[0].table)
            chosen = OperatingPoint(everything, self.points[0].predictor)
        else:
            below = [point for point in self.points if point.compute <= compute + 1e-9]
            if not below:
                shares = ", ".join(f"{share:.3g}" for share in sorted(self.shares))
                raise ValueError(f"compute is {compute:g}, and this adapter has {shares} (and 1): ask for one of them")
            chosen = max(below, key=lambda point: point.compute)
        self.reuse.use(StepTable(chosen.table), chosen.predictor())
        return chosen.compute

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """The plain backbone."""
        with self.reuse.bypassed():
            yield

    def detach(self) -> None:
        """Gives transformer and pipeline back as they were."""
        if self._guard is not None:
            self._guard.detach()
            self._guard = None
        self.reuse.detach()
