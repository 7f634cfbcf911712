"""HarmoniCa: a learned table says, for every sampler step and sub-module, whether to compute or to reuse.

Source: Huang et al. 2025, "HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion
Transformer Acceleration", arXiv:2410.01723.  Learning-to-Cache (Ma et al. 2024, arXiv:2406.01733) is another way to
train the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts import AdapterEntry, Granularity, Predictor
from modules.learned_cache import CacheHandle, OperatingPoint, Sampling
from modules.linear_forecast import LinearForecast, taylor_weights
from modules.reuse import Delta, Hold, Taylor
from modules.sites import find_transformer

CARD_NOTES = (
    "`handle.use(compute=0.65)` goes over to another operating point, `handle.shares` lists them, and "
    "`handle.use(compute=1)` computes everything."
)
REUSE_OPS = ("hold", "taylor1", "taylor2", "linear")
BOUND = 5.0
"""Logits stay within +-5."""


@dataclass(frozen=True, kw_only=True)
class HarmoniCaConfig:
    """All it takes to rebuild the cache: the adapter's "module" entry.

    Attributes:
        units: qualified names of what is routed, in the order of the table's columns.
        granularity: what a unit is: "submodule" (attention and feed-forward, as published), "block", or "model", a
            whole step.
        routed: the steps that have a row; all others compute everything.  The first step never has one.
        reuse_op: what a reused unit returns: its last output ("hold", as published), Newton extrapolation ("taylor1",
            "taylor2"), or a learned forecast ("linear").
        history: how many values the learned forecast looks back on.
        tau: a unit is computed where its score exceeds this.
        default: the operating point that is used when it is attached.
        timesteps, guidance, sampler, call: see `Sampling`.
    """

    units: list[str]
    routed: list[int]
    timesteps: list[int]
    guidance: float
    granularity: Granularity = "submodule"
    reuse_op: str = "hold"
    history: int = 3
    tau: float = 0.1
    default: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reuse_op not in REUSE_OPS:
            raise ValueError(f"reuse_op is {self.reuse_op!r}, which is not one of {', '.join(REUSE_OPS)}")
        if self.routed != sorted(set(self.routed)) or not all(0 < i < len(self.timesteps) for i in self.routed):
            raise ValueError(f"routed is {self.routed}: it must rise within 1 .. {len(self.timesteps) - 1}")

    @property
    def sees_inputs(self) -> bool:
        """Whether the learned forecast looks at units' inputs too: where they are the sampler's latents."""
        return self.reuse_op == "linear" and self.granularity == "model"

    @property
    def weights(self) -> int:
        """W, how many weights the learned forecast has per step and unit."""
        return 2 * self.history + 1 if self.sees_inputs else self.history

    @property
    def sampling(self) -> Sampling:
        """What the numbers hold for."""
        return Sampling(timesteps=self.timesteps, guidance=self.guidance, sampler=self.sampler, call=self.call)


class RouterTable(nn.Module):
    """Independent scores r = sigmoid(logit) for every routed step and unit.

    Shapes: R routed steps in sampling order, N units, W weights: H of outputs, newest first, then those of inputs.
    Attributes:
        logits: R rows [N], a parameter each, so that an update of one step leaves the others and their moments alone.
        corrections: with reuse_op "linear", R tensors [N, W]: what the forecast's weights differ by from Taylor-1's.
    """

    def __init__(self, config: HarmoniCaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        units, shape = len(config.units), (len(config.units), config.weights)
        start = [torch.randn(units, generator=generator).clamp(-BOUND, BOUND) for _ in config.routed]
        self.logits = nn.ParameterList([nn.Parameter(row) for row in start])
        linear = config.routed if config.reuse_op == "linear" else []
        self.corrections = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _ in linear])

    def forward(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Scores [N] of a routed step, and its corrections [N, W] if there are any."""
        row = self.config.routed.index(step)
        return self.logits[row].sigmoid(), self.corrections[row] if len(self.corrections) else None

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps all logits within +-5; done after every update."""
        for row in self.logits:
            row.clamp_(-BOUND, BOUND)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """All scores [T, N]; 1 where nothing is routed."""
        table = torch.ones(len(self.config.timesteps), len(self.config.units))
        for step, row in zip(self.config.routed, self.logits, strict=True):
            table[step] = row.detach().sigmoid().cpu()
        return table

    def mask(self) -> Tensor:
        """What is computed, bool [T, N]: scores above tau, and all of the first step."""
        return self.scores() > self.config.tau

    def mask_at(self, compute: float) -> Tensor:
        """What is computed, bool [T, N], if the highest scores may make up a share `compute` of all units.

        Steps without a row are computed whatever that share says.
        """
        scores = self.scores()
        free = torch.zeros(len(scores), dtype=torch.bool)
        free[self.config.routed] = True
        order = scores.masked_fill(~free[:, None], torch.inf).flatten().argsort(descending=True, stable=True)
        fixed = int((~free).sum()) * scores.shape[1]
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[order[: max(fixed, round(compute * scores.numel()))]] = True
        return mask.view_as(scores)

    def forecast_weights(self, mask: Tensor) -> Tensor:
        """The learned forecast's weights [T, N, W] under a mask: Taylor-1 at the steps computed before, corrected."""
        config = self.config
        weights = torch.zeros(*mask.shape, config.weights)
        for unit in range(mask.shape[1]):
            before: list[int] = []
            for step, computed in enumerate(mask[:, unit].tolist()):
                if computed:
                    before = [step, *before][: config.history]
                elif before:
                    weights[step, unit, : config.history] = torch.tensor(taylor_weights(step, before, config.history))
        for row, step in enumerate(config.routed if len(self.corrections) else []):
            weights[step] += self.corrections[row].detach().cpu()
        return weights


def predictor_of(
    reuse_op: str, weights: Tensor | None = None, history: int = 3, granularity: Granularity = "submodule"
) -> Callable[[], Predictor]:
    """What stands in for reused units; `weights` [T, N, W] are the learned forecast's, those of outputs first.

    Of whole blocks it is what they add to their input that is held or extrapolated: the current input flows through.
    """
    if reuse_op == "linear":
        if weights is None:
            raise ValueError("reuse_op is 'linear', which needs the forecast's weights")
        outputs, inputs = weights[..., :history], weights[..., history:]
        return lambda: LinearForecast(outputs, inputs if inputs.shape[2] else None)
    if reuse_op == "hold":
        return Delta if granularity == "block" else Hold
    return lambda: Taylor(int(reuse_op[-1]), feature="residual" if granularity == "block" else "output")


def reuse_ratio(mask: Tensor) -> float:
    """Cache utilisation ratio: reused unit calls over all unit calls, the first step's included."""
    return 1.0 - float(mask.float().mean())


def operating_points(config: HarmoniCaConfig, masks: Tensor, weights: Tensor | None) -> list[OperatingPoint]:
    """The host's operating points.

    Args:
        masks: [P, T, N] bool.
        weights: [P, T, N, W] of the learned forecast, or None.
    """
    each = [None] * len(masks) if weights is None else list(weights)
    return [
        OperatingPoint(mask, predictor_of(config.reuse_op, own, config.history, config.granularity))
        for mask, own in zip(masks, each, strict=True)
    ]


def attach_masks(target: Any, config: HarmoniCaConfig, masks: Tensor, weights: Tensor | None) -> CacheHandle:
    """Runs a pipeline, or a transformer, with reuse."""
    points = operating_points(config, masks, weights)
    handle = CacheHandle(target, config.sampling, points, config.default, config.granularity)
    if (here := list(handle.reuse.unit_names)) != config.units:
        handle.detach()
        other = next(name for name in config.units if name not in here)
        raise ValueError(f"this adapter routes {other}, which the transformer lacks: load the adapter made for it")
    return handle


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> CacheHandle:
    """Attaches an exported adapter to a pipeline or a transformer.

    Call the pipeline with `**handle.call_kwargs`: number of steps and guidance are part of what was trained.

    Raises:
        ValueError: the adapter does not fit this backbone or its sampler.
    """
    find_transformer(target)
    config = HarmoniCaConfig(**manifest.module)
    return attach_masks(target, config, tensors["router.masks"], tensors.get("forecast.weights"))


def module_entry(config: HarmoniCaConfig) -> dict[str, Any]:
    """The config as JSON values, for the manifest."""
    return asdict(config)
