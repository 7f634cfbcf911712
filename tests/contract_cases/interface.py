"""What a method hands to the contract tests, in tests/contract_cases/<method>.py as a function `case(folder)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainers.config import RecipeBase


@dataclass(frozen=True, kw_only=True)
class ContractCase:
    """One method on a tiny backbone.

    Attributes:
        recipe: trains in about a second; `trainer.max_steps` updates move every learned tensor.
        target: a fresh pipeline or model with the recipe's backbone's weights.
        outputs: a deterministic run of a target, with the handle attached to it or without any.
        graph_outputs: what `outputs` must give with the task's exported adapter, by the training graph.
        make_neutral: puts a handle at the setting at which it changes nothing.
        baseline: what `outputs` of another target must be with a neutral handle; without, that of a bare target.
        work: executed work of `outputs`, counted where it happens.
        misfits: by the words that the refusal must have: a target or a run that the adapter was not made for.
        bound: absolute and relative, of the exported adapter against the training graph.
        neutral_bound: 0 is bit for bit.
        still: learned tensors that the recipe's updates cannot move, with the reason.
    """

    recipe: RecipeBase
    target: Callable[[], Any]
    outputs: Callable[[Any, Any], Tensor]
    graph_outputs: Callable[[Any], Tensor]
    make_neutral: Callable[[Any], None]
    work: Callable[[Any, Any], float]
    misfits: Mapping[str, Callable[[Any], Any]]
    baseline: Callable[[Any, Any], Tensor] | None = None
    bound: float = 1e-4
    neutral_bound: float = 0.0
    still: Mapping[str, str] = field(default_factory=dict)
