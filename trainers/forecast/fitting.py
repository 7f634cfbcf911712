"""Fitting the forecast in closed form, step after step on the student's own states, and searching where to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modules.linear_forecast import ridge, taylor_weights
from trainers.forecast.walk import State, Walk


class Fitter:
    """Fits the weights of skipped steps so that the sampler is led back to the recorded full run.

    At a skipped step the sampler is affine in the prediction, x' = y + kappa * prediction; the weights solve the least
    squares problem of |x' - recorded|, pulled towards Taylor-1 of the predictions (`modules.linear_forecast.ridge`).

    Attributes:
        fitted: how many of the runs the weights are fitted on; all of them walk along.
    """

    def __init__(self, walk: Walk, fitted: int | None = None, strength: float = 1e-7) -> None:
        self.walk, self.strength = walk, strength
        self.fitted = len(walk.runs) if fitted is None else fitted
        # Of the last walk: the states before each step, its weights, and which steps it computed.
        self._states: list[State] = []
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._computed: list[bool] = []

    @torch.no_grad()
    def fit(self, computed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Walks all runs, fitting on the way.

        Steps that the last walk had in common from the start are not walked again.

        Args:
            computed: by step; the first must be.
        Returns:
            the weights of outputs [T, H] and inputs [T, 1 + H], zero at computed steps, and the final latents.
        """
        common = 0
        while common < len(self._computed) and self._computed[common] == computed[common]:
            common += 1
        common = min(common, len(self._states) - 1) if self._states else 0
        states = self._states[: common + 1] or [self.walk.begin()]
        weights, history = self._weights[:common], self.walk.history
        for step in range(common, len(computed)):
            state = self.walk.fork(states[step])
            if computed[step]:
                weights.append((torch.zeros(history), torch.zeros(history + 1)))
                states.append(self.walk.computed(state, step))
            else:
                weights.append(self._fitted(state, step))
                states.append(self.walk.forecast(state, step, weights[-1]))
        self._states, self._weights, self._computed = states, weights, list(computed)
        outputs, inputs = (torch.stack(part) for part in zip(*weights, strict=True))
        return outputs, inputs, states[-1].latents

    def _fitted(self, state: State, step: int) -> tuple[Tensor, Tensor]:
        walk, history, known = self.walk, self.walk.history, len(state.outputs)
        nothing = walk.probe(state, step, torch.zeros_like(state.latents))
        newest = state.outputs[0]
        change = (walk.probe(state, step, newest) - nothing)[: self.fitted]
        gain = float((change * newest[: self.fitted]).sum() / newest[: self.fitted].square().sum())
        wanted = (walk.runs.at(step + 1) - nothing) / gain
        features = [*state.outputs, walk.shown(state, step), *state.inputs]
        prior = torch.zeros(len(features), dtype=torch.float64)
        prior[:known] = torch.tensor(taylor_weights(step, state.steps, known))
        rows = torch.stack([feature[: self.fitted].flatten() for feature in features])
        solved = ridge(rows, wanted[: self.fitted].flatten(), prior.to(rows.device), self.strength).float().cpu()
        outputs, inputs = torch.zeros(history), torch.zeros(history + 1)
        outputs[:known], inputs[: known + 1] = solved[:known], solved[known:]
        return outputs, inputs


def even_steps(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, evenly spread from the first."""
    return sorted({i * steps // count for i in range(count)})


def late_steps(count: int, steps: int) -> list[int]:
    """`count` steps, the first and then ever closer: where computed steps are worth most, and a search begins."""
    found = [round((steps - 1) * (i / max(1, count - 1)) ** 0.7) for i in range(count)]
    for i in range(count - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - 1)
    return [0, *(max(step, i) for i, step in enumerate(found[1:], 1))]


def mask_of(computed: Sequence[int], steps: int) -> list[bool]:
    """One flag per step."""
    return [step in computed for step in range(steps)]


def image_error(fitter: Fitter) -> Callable[[Tensor], float]:
    """Mean squared error of the images of those runs that nothing is fitted on."""
    running, runs, first = fitter.walk.driver, fitter.walk.runs, fitter.fitted
    wanted = running.decode(runs.at(len(runs.timesteps))[first:])

    def error(final: Tensor) -> float:
        return float((running.decode(final[first:]) - wanted).square().mean())

    return error


def search_steps(
    fitter: Fitter, judge: Callable[[Tensor], float], start: list[int], rounds: int = 2
) -> tuple[list[int], float]:
    """Which steps to compute, by coordinate descent from `start`.

    Args:
        judge: final latents of all runs -> what is to be small.
        rounds: at most so many sweeps over the computed steps; a step moves by one or two while that helps.
    """
    steps, known = len(fitter.walk.timesteps), dict[tuple[int, ...], float]()

    def error(computed: list[int]) -> float:
        key = tuple(computed)
        if key not in known:
            known[key] = judge(fitter.fit(mask_of(computed, steps))[2])
        return known[key]

    best = list(start)
    for _ in range(rounds):
        before = list(best)
        # From the last to the first: what comes before a change need not be walked again.
        for i in range(len(best) - 1, 0, -1):
            for move in (1, -1, 2, -2):
                while (moved := _moved(best, i, move, steps)) is not None and error(moved) < error(best):
                    best = moved
        if best == before:
            break
    return best, error(best)


def _moved(computed: list[int], i: int, move: int, steps: int) -> list[int] | None:
    step = computed[i] + move
    if not 0 < step < steps or step in computed:
        return None
    return sorted([*computed[:i], step, *computed[i + 1 :]])
