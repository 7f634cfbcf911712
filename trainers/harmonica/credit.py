"""What a cached value is worth to later steps, which a step's own loss does not see (docs/methods/harmonica.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts import Features
from modules.harmonica import HarmoniCaConfig
from trainers.harmonica.student import Row, SoftCache

Worth = tuple[int, int, Tensor]
"""A step, a unit, and what its score changes the loss of the step that was just walked by; a scalar."""


@dataclass
class _Slot:
    """A unit's held value, and the other values that it could hold now.

    Attributes:
        written: the step that computed `value`.  before: what it replaced; None where it had to be computed.
        passed: the newest step since then that did not write, and what it would have written.
    """

    value: Tensor
    written: int
    before: Tensor | None = None
    passed: tuple[int, Tensor] | None = None


class CreditedCache(SoftCache):
    """A soft cache that also tells what the scores of earlier steps did for this one.

    An update reaches one step's scores, through its blend, but a score decides about the slot too: above tau the
    computed value is written, and steps until the next write reuse it.  So a slot counts as r computed + (1 - r) held,
    with the value of the hard decision: the loss's gradient at the slot, times what the write changed, is what that
    score was worth to this step.  The write that a held value comes from is credited for as long as it lives, and of
    the steps since then, which did not write, the newest one.  Three tensors per unit, however many steps there are.
    """

    def __init__(self, config: HarmoniCaConfig) -> None:
        super().__init__(config)
        self._slots: dict[int, _Slot] = {}
        self._reused: list[tuple[Tensor, list[tuple[int, int, Tensor]]]] = []

    def set_row(self, row: Row | None) -> None:
        """See the parent; a step that comes next has not reused anything yet."""
        super().set_row(row)
        if row is not None:
            self._reused = []

    def blend(self, unit: int, step: int, inputs: Features, outputs: Features) -> Features:
        """See `Student`."""
        (output,) = outputs
        computed = output.detach()
        if self._scores is None:
            self._slots[unit] = _Slot(computed, step)
            return outputs
        slot, score = self._slots[unit], self._scores[unit].to(output.dtype)
        held = slot.value
        if torch.is_grad_enabled():
            held = held.detach().clone().requires_grad_()
            self._reused.append((held, _others(unit, slot)))
        if self._computes[unit]:
            self._slots[unit] = _Slot(computed, step, before=slot.value)
        else:
            slot.passed = (step, computed)
        return (score * output + (1 - score) * held,)

    def worths(self) -> list[Worth]:
        """After backward, once: what earlier scores were worth to the step, in units of its loss."""
        reused, self._reused = self._reused, []
        found = []
        for held, others in reused:
            if held.grad is not None:
                found += [(step, unit, (held.grad * change).sum().float()) for step, unit, change in others]
        return found


def _others(unit: int, slot: _Slot) -> list[tuple[int, int, Tensor]]:
    """Steps whose score could have changed what is held, and the change from a score of 0 to one of 1."""
    found = []
    if slot.before is not None:
        found.append((slot.written, unit, slot.value - slot.before))
    if slot.passed is not None:
        found.append((slot.passed[0], unit, slot.passed[1] - slot.value))
    return found
