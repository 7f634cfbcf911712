"""The learned forecast: on some steps the transformer is not run, and a weighted sum of what it said stands in for it.

A skipped step costs a handful of multiply-adds per latent.  The weights, a few for every skipped step, are fitted so
that the sampler is led back to the latents of a full run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts import AdapterEntry
from modules.learned_cache import CacheHandle, OperatingPoint, Sampling
from modules.linear_forecast import LinearForecast
from modules.sites import find_transformer

CARD_NOTES = (
    "`handle.use(compute=0.35)` goes over to another operating point, `handle.points` lists them, and "
    "`handle.use(compute=1)` computes everything."
)


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """All it takes to rebuild the forecast: the adapter's "module" entry.

    Attributes:
        computed: for each operating point the steps in which the transformer runs, rising; the first is step 0.
        default: the operating point that is used when it is attached.
        history: how many computed steps a forecast looks back on.
        timesteps, guidance, sampler, call: see `Sampling`.
    """

    computed: list[list[int]]
    timesteps: list[int]
    guidance: float
    default: int = 0
    history: int = 3
    sampler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for steps in self.computed:
            if steps[:1] != [0] or steps != sorted(set(steps)) or steps[-1] >= len(self.timesteps):
                raise ValueError(
                    f"computed is {steps}: it must rise from 0, the first step, within the {len(self.timesteps)} steps"
                )
        if not 0 <= self.default < len(self.computed):
            raise ValueError(f"default is {self.default} but there are {len(self.computed)} operating points")

    @property
    def sampling(self) -> Sampling:
        """What the numbers hold for."""
        return Sampling(timesteps=self.timesteps, guidance=self.guidance, sampler=self.sampler, call=self.call)

    def table(self, point: int) -> Tensor:
        """Which steps an operating point computes, bool [T]."""
        table = torch.zeros(len(self.timesteps), dtype=torch.bool)
        table[self.computed[point]] = True
        return table


class ForecastModule(nn.Module):
    """The weights of every operating point.

    Shapes: P operating points, T steps, H history.
    `outputs` [P, T, H] weigh the last H predictions, newest first; `inputs` [P, T, 1 + H] the present latents and those
    that belong to the predictions.  Rows of computed steps are not used.
    """

    def __init__(self, config: ForecastConfig) -> None:
        super().__init__()
        self.config = config
        points, steps = len(config.computed), len(config.timesteps)
        self.outputs = nn.Parameter(torch.zeros(points, steps, config.history))
        self.inputs = nn.Parameter(torch.zeros(points, steps, config.history + 1))

    def forward(self, point: int, step: int) -> tuple[Tensor, Tensor]:
        """The weights of one step: [H] and [1 + H]."""
        return self.outputs[point, step], self.inputs[point, step]

    def operating_points(self) -> list[OperatingPoint]:
        """The present weights, for the reuse host."""
        return [self._point(i) for i in range(len(self.config.computed))]

    def _point(self, index: int) -> OperatingPoint:
        outputs, inputs = self.outputs[index].detach().unsqueeze(1), self.inputs[index].detach().unsqueeze(1)
        return OperatingPoint(self.config.table(index).unsqueeze(1), lambda: LinearForecast(outputs, inputs))


def attach_module(target: Any, module: ForecastModule) -> CacheHandle:
    """Runs a pipeline, or a transformer, with the forecast."""
    return CacheHandle(target, module.config.sampling, module.operating_points(), module.config.default, "model")


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> CacheHandle:
    """Attaches an exported adapter to a pipeline or a transformer.

    Call the pipeline with `**handle.call_kwargs`: number of steps and guidance are part of what was trained.

    Raises:
        ValueError: the adapter does not fit this backbone or its sampler.
    """
    find_transformer(target)
    module = ForecastModule(ForecastConfig(**manifest.module))
    module.load_state_dict(tensors)
    return attach_module(target, module)


def module_entry(config: ForecastConfig) -> dict[str, Any]:
    """The config as JSON values, for the manifest."""
    return asdict(config)
