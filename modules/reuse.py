"""The untrained selectors (every N steps, a table, a first-block test) and predictors (hold, delta, Taylor)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.contracts import GRANULARITIES, Features, Granularity, Predictor, Selector


class EveryN(Selector):
    """Computes everything in the first `warmup` steps and in every `interval`-th step from then on.

    `first` is the first full step after the warm-up, by default `interval` steps after the warm-up's last.
    """

    def __init__(self, interval: int, warmup: int = 1, first: int | None = None) -> None:
        if interval < 1 or warmup < 1:
            raise ValueError(f"interval is {interval} and warmup is {warmup}: both must be at least 1")
        self.interval, self.warmup = interval, warmup
        self.first = warmup - 1 + interval if first is None else first

    @classmethod
    def taylorseer(cls, interval: int = 5, warmup: int = 3) -> EveryN:
        """The full steps of diffusers' TaylorSeerCacheConfig(cache_interval, disable_cache_before_step)."""
        return cls(interval, warmup, first=warmup + 1)

    def computes(self, step: int, unit: int, hidden: Tensor | None) -> bool:
        """The same for all units."""
        return step < self.warmup or (step - self.first) % self.interval == 0


class StepTable(Selector):
    """A fixed schedule: entry [step, unit] says whether the unit is computed; a table [step] holds for all units.

    Raises (when a trajectory begins):
        ValueError: the table is not made for this number of steps or units.
    """

    def __init__(self, table: Tensor | Sequence[bool] | Sequence[Sequence[bool]]) -> None:
        rows = torch.as_tensor(table, dtype=torch.bool)
        if rows.dim() not in (1, 2) or rows.numel() == 0:
            raise ValueError(f"the table has shape {tuple(rows.shape)}: it must be [steps] or [steps, units]")
        self.rows: list[list[bool]] = rows.reshape(len(rows), -1).tolist()

    def begin(self, num_steps: int | None, units: int) -> None:
        """Checks that the table fits."""
        if num_steps is not None and num_steps != len(self.rows):
            raise ValueError(
                f"the table has {len(self.rows)} rows but the sampler runs {num_steps} steps: they must agree"
            )
        if len(self.rows[0]) not in (1, units):
            raise ValueError(f"the table has {len(self.rows[0])} columns but there are {units} units: they must agree")

    def computes(self, step: int, unit: int, hidden: Tensor | None) -> bool:
        """The table's entry."""
        if step >= len(self.rows):
            raise ValueError(
                f"the table has {len(self.rows)} rows but the sampler is at step {step + 1}: they must agree"
            )
        row = self.rows[step]
        return row[unit if len(row) > 1 else 0]


class FirstBlockTest(Selector):
    """Skips a step when the first unit's residual has hardly moved since the last computed step.

    Computes when mean|r - r_last| / mean|r_last| > `threshold`, r being the residual of unit 0, which always runs.
    With granularity "span" and `Delta` this is diffusers' FirstBlockCache, bit for bit.  It reads one number back to
    the host per step; no other member does.
    """

    static = False

    def __init__(self, threshold: float = 0.05) -> None:
        self.threshold = threshold
        self._inputs: dict[str | None, Tensor] = {}
        self._residuals: dict[str | None, Tensor] = {}
        self._decisions: dict[str | None, bool] = {}

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Whole blocks, whose residual is output minus input."""
        return ("block", "span")

    def begin(self, num_steps: int | None, units: int) -> None:
        """Forgets the last trajectory."""
        self._inputs.clear()
        self._residuals.clear()
        self._decisions.clear()

    def memory_bytes(self) -> int:
        """Bytes of the residuals that the test compares with, and of an input on its way to it."""
        return stored_bytes([*self._inputs.values(), *self._residuals.values()])

    def computes(self, step: int, unit: int, hidden: Tensor | None) -> bool:
        """Unit 0: yes.  Unit 1: the test, on the residual between its input and unit 0's.  Others: as unit 1."""
        if hidden is None:
            raise TypeError("FirstBlockTest decides from features: the host must pass the unit's input")
        if unit == 0:
            self._inputs[self.context] = hidden.detach()
            return True
        if unit == 1:
            self._decisions[self.context] = self._moved(hidden.detach())
        return self._decisions[self.context]

    def _moved(self, hidden: Tensor) -> bool:
        if self.context not in self._inputs:
            raise ValueError("FirstBlockTest needs a block in front to look at: let the span begin at block 1 or later")
        residual = hidden - self._inputs.pop(self.context)
        last = self._residuals.get(self.context)
        moved = last is None or ((residual - last).abs().mean() / last.abs().mean()).item() > self.threshold
        if moved:
            self._residuals[self.context] = residual
        return moved


class Hold(Predictor):
    """Repeats the last computed output (zeroth order; FORA, DeepCache, PAB)."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str | None, int], Features] = {}

    def ready(self, unit: int) -> bool:
        """After the first observation."""
        return (self.context, unit) in self._kept

    def observe(self, unit: int, step: int, inputs: Features, outputs: Features) -> None:
        """Keeps the outputs."""
        self._kept[self.context, unit] = tuple(output.detach() for output in outputs)

    def predict(self, unit: int, step: int, inputs: Features) -> Features:
        """The kept outputs."""
        return self._kept[self.context, unit]

    def release(self, unit: int) -> None:
        """Frees one slot."""
        self._kept.pop((self.context, unit), None)

    def reset(self) -> None:
        """Frees all slots."""
        self._kept.clear()

    def memory_bytes(self) -> int:
        """Bytes of all slots."""
        return stored_bytes([tensor for kept in self._kept.values() for tensor in kept])


class Delta(Hold):
    """Adds the residual of the last computed call to the current input (Delta-DiT, FirstBlockCache)."""

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Whole blocks; a sub-module's output is a residual already, so hold it."""
        return ("block", "span")

    def observe(self, unit: int, step: int, inputs: Features, outputs: Features) -> None:
        """Keeps output minus input."""
        self._kept[self.context, unit] = _minus(outputs, inputs)

    def predict(self, unit: int, step: int, inputs: Features) -> Features:
        """Input plus the kept residual."""
        return _plus(inputs, self._kept[self.context, unit])


@dataclass
class _Expansion:
    """Differences of one unit's features, newest first: `factors[stream][order]`, made from features at `steps`."""

    steps: tuple[int, ...]
    factors: tuple[tuple[Tensor, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class Taylor(Predictor):
    """Extrapolates features over steps from their last `order` + 1 computed values.

    Args:
        order: highest difference used; fewer are while fewer values have been seen.
        form: "newton": backward differences in Newton's form, exact for features polynomial in the step, of degree up
            to `order`, at any spacing.  "taylor": the same differences used as derivatives, exact for degree 1 only;
            equals diffusers' TaylorSeer bit for bit (arXiv:2503.06923).
        dtype: what differences are stored in; None is the features' own (diffusers' default is bfloat16).
        feature: "output" extrapolates what the unit returned, "residual" output minus input, added to the current
            input; the latter for whole blocks only.

    Under torch.compile each unit is a graph break (its weights change with every step); hold and delta are none.
    """

    def __init__(
        self,
        order: int = 1,
        form: Literal["newton", "taylor"] = "newton",
        dtype: torch.dtype | None = None,
        feature: Literal["output", "residual"] = "output",
    ) -> None:
        if order < 0:
            raise ValueError(f"order is {order}: it must be 0 or more")
        if form not in ("newton", "taylor"):
            raise ValueError(f"form is {form!r}: use 'newton' or 'taylor'")
        if feature not in ("output", "residual"):
            raise ValueError(f"feature is {feature!r}: use 'output' or 'residual'")
        self.order, self.form, self.dtype, self.feature = order, form, dtype, feature
        self.history = order + 1
        self._slots: dict[tuple[str | None, int], _Expansion] = {}

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Everywhere, residuals at whole blocks only."""
        return GRANULARITIES if self.feature == "output" else ("block", "span")

    def ready(self, unit: int) -> bool:
        """After the first observation; the order grows with the following ones."""
        return (self.context, unit) in self._slots

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def observe(self, unit: int, step: int, inputs: Features, outputs: Features) -> None:
        """Renews the differences.  A step seen before, or a new shape, starts over from order 0."""
        features = _minus(outputs, inputs) if self.feature == "residual" else tuple(x.detach() for x in outputs)
        last = self._slots.get((self.context, unit))
        if last is not None and (step in last.steps or last.factors[0][0].shape != features[0].shape):
            last = None
        self._slots[self.context, unit] = _Expansion(
            steps=(step,) if last is None else (step, *last.steps[: self.order]),
            factors=tuple(
                self._differences(feature, step, last.steps if last else (), last.factors[stream] if last else ())
                for stream, feature in enumerate(features)
            ),
            dtypes=tuple(feature.dtype for feature in features),
        )

    def _differences(
        self, feature: Tensor, step: int, steps: tuple[int, ...], previous: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        factors = [feature]
        for order, factor in enumerate(previous[: self.order]):
            # Newton divides by the distance to the oldest value in the difference, TaylorSeer by that to the last one.
            gap = step - steps[order if self.form == "newton" else 0]
            factors.append((factors[order] - factor.to(feature.dtype)) / gap)
        return tuple(factor.to(self.dtype or factor.dtype) for factor in factors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def predict(self, unit: int, step: int, inputs: Features) -> Features:
        """The expansion's value at `step`, plus the input if residuals are extrapolated."""
        slot = self._slots[self.context, unit]
        weights = self._weights(step, slot.steps)
        outputs = []
        for factors, dtype in zip(slot.factors, slot.dtypes, strict=True):
            output = factors[0].to(dtype)
            for factor, weight in zip(factors[1:], weights[1:], strict=True):
                output = output + factor.to(dtype) * weight
            outputs.append(output)
        return tuple(outputs) if self.feature == "output" else _plus(inputs, tuple(outputs))

    def _weights(self, step: int, steps: tuple[int, ...]) -> list[float]:
        if self.form == "taylor":
            return [(step - steps[0]) ** order / math.factorial(order) for order in range(len(steps))]
        return [float(math.prod(step - node for node in steps[:order])) for order in range(len(steps))]

    def release(self, unit: int) -> None:
        """Frees one slot."""
        self._slots.pop((self.context, unit), None)

    def reset(self) -> None:
        """Frees all slots."""
        self._slots.clear()

    def memory_bytes(self) -> int:
        """Bytes of all differences."""
        return stored_bytes([x for slot in self._slots.values() for factors in slot.factors for x in factors])


def _minus(outputs: Features, inputs: Features) -> Features:
    return tuple(output.detach() - given.detach() for output, given in zip(outputs, inputs, strict=True))


def _plus(inputs: Features, residuals: Features) -> Features:
    return tuple(given + residual for given, residual in zip(inputs, residuals, strict=True))


def stored_bytes(tensors: list[Tensor]) -> int:
    """Bytes that these tensors hold on to."""
    # Whole storages, once each: a view keeps all of the tensor that it looks at.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
