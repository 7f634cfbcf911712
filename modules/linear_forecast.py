"""A linear forecast of skipped units from their last computed values, with weights of its own for every step.

Taylor extrapolation is one choice of these weights; fitted ones are due to L2P (arXiv:2604.26365), whose weights are
for outputs alone.  Here the units' inputs can take part too: where a unit is the whole transformer they are the
sampler's latents, and the forecast can lead the sampler back to where a full run would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contracts import Features, Predictor
from modules.reuse import stored_bytes

Weights = Sequence[float] | Tensor


def combined(
    output_weights: Weights, input_weights: Weights, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """sum_j output_weights[j] outputs[j] + sum_j input_weights[j] inputs[j], in float32 at least.

    Args:
        outputs: the unit's last computed outputs, newest first; weights without an output count as zero.
        inputs: the present input, then those that belong to `outputs`.  They may have fewer channels (a prediction
            that carries variances has more than the latents); they count towards the first ones then.
    """
    wide = torch.promote_types(outputs[0].dtype, torch.float32)
    total = torch.zeros_like(outputs[0], dtype=wide)
    for index, output in enumerate(outputs):
        total = total + output_weights[index] * output.to(wide)
    if len(input_weights):
        latent = torch.zeros_like(inputs[0], dtype=wide)
        for index, value in enumerate(inputs):
            latent = latent + input_weights[index] * value.to(wide)
        missing = total.shape[1] - latent.shape[1]
        if missing:
            latent = torch.cat([latent, latent.new_zeros(len(latent), missing, *latent.shape[2:])], dim=1)
        total = total + latent
    return total


class LinearForecast(Predictor):
    """Stands in for skipped units by a weighted sum of their last values.

    Args:
        outputs: [T, N, H], the weights of the last H outputs, newest first, for each of T steps and N units.
        inputs: [T, N, 1 + H], the weights of the present input and of the inputs that led to those outputs, or None.

    Under torch.compile each predicted unit is a graph break, as with `Taylor`.
    """

    def __init__(self, outputs: Tensor, inputs: Tensor | None = None) -> None:
        if outputs.dim() != 3 or (inputs is not None and inputs.shape != (*outputs.shape[:2], outputs.shape[2] + 1)):
            given = None if inputs is None else tuple(inputs.shape)
            raise ValueError(
                f"outputs are {tuple(outputs.shape)} and inputs {given}: they must be [steps, units, history] and "
                "[steps, units, 1 + history]"
            )
        self.history = outputs.shape[2]
        # On the host once, since a weight that is read in a step would wait for the device.
        self._outputs: list[list[list[float]]] = outputs.tolist()
        self._inputs: list[list[list[float]]] | None = None if inputs is None else inputs.tolist()
        self._kept: dict[tuple[str | None, int], list[tuple[int, Tensor, Tensor | None]]] = {}

    def ready(self, unit: int) -> bool:
        """After the first observation."""
        return (self.context, unit) in self._kept

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def observe(self, unit: int, step: int, inputs: Features, outputs: Features) -> None:
        """Keeps the outputs, and the inputs where they have weights; a new shape starts over."""
        if len(outputs) != 1:
            raise ValueError(
                f"a linear forecast is for one stream, and this unit has {len(outputs)}: use hold or Taylor"
            )
        before = self._kept.get((self.context, unit), [])
        if before and before[0][1].shape != outputs[0].shape:
            before = []
        newest = (step, outputs[0].detach(), None if self._inputs is None else inputs[0].detach())
        self._kept[self.context, unit] = [newest, *before][: self.history]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def predict(self, unit: int, step: int, inputs: Features) -> Features:
        """The weighted sum at `step`, in the outputs' dtype."""
        kept = self._kept[self.context, unit]
        values = [output for _, output, _ in kept]
        weights, input_weights = self.weights(step, unit, [made for made, _, _ in kept])
        given = [inputs[0], *(value for _, _, value in kept if value is not None)] if len(input_weights) else []
        return (combined(weights, input_weights, values, given).to(values[0].dtype),)

    def weights(self, step: int, unit: int, steps: Sequence[int]) -> tuple[Weights, Weights]:
        """The weights of outputs and inputs at a step; `steps` are those that the outputs are of, newest first."""
        if step >= len(self._outputs):
            raise ValueError(f"the forecast is for {len(self._outputs)} steps but the sampler is at step {step + 1}")
        return self._outputs[step][unit], [] if self._inputs is None else self._inputs[step][unit]

    def release(self, unit: int) -> None:
        """Frees one slot."""
        self._kept.pop((self.context, unit), None)

    def reset(self) -> None:
        """Frees all slots."""
        self._kept.clear()

    def memory_bytes(self) -> int:
        """Bytes of all values kept."""
        return stored_bytes([x for kept in self._kept.values() for entry in kept for x in entry[1:] if x is not None])


def taylor_weights(step: int, steps: Sequence[int], history: int) -> list[float]:
    """First-order Taylor (Newton) extrapolation to `step` as weights of the values at `steps`, newest first.

    Returns:
        `history` weights; with a single value it is held.
    """
    weights = [0.0] * history
    if len(steps) < 2 or history < 2:
        weights[0] = 1.0
        return weights
    slope = (step - steps[0]) / (steps[0] - steps[1])
    weights[0], weights[1] = 1.0 + slope, -slope
    return weights


def ridge(features: Tensor, target: Tensor, prior: Tensor, strength: float) -> Tensor:
    """Least squares pulled towards a prior: (A'A + rho I)^-1 (A'b + rho w0), rho = strength * mean column energy.

    Args:
        features: [F, M], one row per feature.
        target: [M].
        prior: [F], w0.
    Returns:
        weights [F], float64.
    """
    wide = features.double()
    gram = wide @ wide.T
    rho = strength * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + rho * eye, wide @ target.double() + rho * prior.double())
    return solved
