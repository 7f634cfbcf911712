"""Sums over the rows of a wide product, of which only some rows ever exist at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Project = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits of some rows, which rows) -> (their loss summed, figures [F] that need no gradient, summed too)."""


def chunked_sum(
    project: Project, reduce: Reduce, states_ND: Tensor, parameters: Sequence[nn.Parameter], rows: int
) -> tuple[Tensor, Tensor]:
    """Sum of `reduce(project(states))` over chunks of `rows` rows, with the gradients of plain autograd.

    Each chunk's gradients are taken while its logits are there, so that nothing is computed twice and the memory beside
    the gradients themselves is that of one chunk.  The gradients of sums, not of means, are what half precision holds.

    Args:
        parameters: what `project` uses and learns.
    Returns:
        (loss, figures [F])
    """
    total, figures = _ChunkedSum.apply(project, reduce, rows, states_ND, *parameters)  # type: ignore[no-untyped-call]
    return total, figures


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, project: Project, reduce: Reduce, rows: int, states: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        wanted = [bool(needed) for needed in ctx.needs_input_grad[3:]]
        state_grad = torch.empty_like(states) if wanted[0] else None
        grads: list[Tensor | None] = [None] * len(parameters)
        total: Tensor | None = None
        figures: Tensor | None = None
        # An empty batch still takes one chunk, so that every parameter has a gradient on every rank.
        for start in range(0, max(1, len(states)), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(any(wanted)):
                piece = states[part].detach().requires_grad_(any(wanted))
                loss, figure = reduce(project(piece), part)
            if any(wanted):
                learned = [p for p, needed in zip(parameters, wanted[1:], strict=True) if needed]
                first, *rest = torch.autograd.grad(loss, [piece, *learned])
                if state_grad is not None:
                    state_grad[part] = first
                _accumulate(grads, rest, wanted[1:])
            loss, figure = loss.detach().float(), figure.detach()
            total = loss if total is None else total + loss
            figures = figure if figures is None else figures + figure
        ctx.grads = [state_grad, *grads]
        figures = cast(Tensor, figures)
        ctx.mark_non_differentiable(figures)
        return cast(Tensor, total), figures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Any, ...]:
        # Scaled in place: these are as large as the parameters, and nobody else holds them.
        grads, ctx.grads = ctx.grads, None
        return (None, None, None, *(None if grad is None else grad.mul_(grad_total) for grad in grads))


def _accumulate(grads: list[Tensor | None], found: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    parts = iter(found)
    for index, needed in enumerate(wanted):
        if needed:
            part, before = next(parts), grads[index]
            grads[index] = part if before is None else before.add_(part)
