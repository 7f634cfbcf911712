"""Where transformers hands us attention: one registered function for every model, and a mask that is made when asked.

A model whose attention implementation is `NAME` attends through its cache layer where that is one of ours, and as with
`sdpa` otherwise.  transformers sizes one mask for all layers; ours differ in length, so the mask travels as a request
that each layer answers for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "afterburner_kv"

Probe = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor] | None] | None]
"""(query, key, value), rotated, as a layer without a cache of ours attends with them; what it returns stands in for
them, with a function of the output [B, T, H_q, d] or None.  None changes nothing."""

_PROBES: WeakKeyDictionary[nn.Module, Probe] = WeakKeyDictionary()


class MaskRequest:
    """What transformers wants masked, not yet laid out.

    Attributes:
        padding: bool [B, seen + T], which tokens are text; None where all are.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self.padding: Tensor | None = arguments.get("attention_mask")

    @cached_property
    def dense(self) -> Tensor | None:
        """The mask that `sdpa` would have been given."""
        mask: Tensor | None = sdpa_mask(**self._arguments)
        return mask


class CacheView(ABC):
    """What a cache layer of ours returns in place of keys and values."""

    @abstractmethod
    def attend(
        self, query: Tensor, padding: Tensor | None, scaling: float, window: int | None, position_ids: Tensor | None
    ) -> Tensor:
        """Attention of the new tokens over all held ones and themselves, [B, T, H_q, d]."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, CacheView):
        if not isinstance(attention_mask, MaskRequest):
            raise ValueError("a cache with a budget makes its own masks: give attention_mask as [sequences, tokens]")
        window = kwargs.get("sliding_window")
        return key.attend(query, attention_mask.padding, scale, window, kwargs.get("position_ids")), None
    found = _PROBES[module](query, key, value) if module in _PROBES else None
    query, key, value, after = found or (query, key, value, None)
    mask = attention_mask.dense if isinstance(attention_mask, MaskRequest) else attention_mask
    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
    return (out if after is None else after(out)), None


def _mask(**arguments: Any) -> MaskRequest:
    return MaskRequest(arguments)


def register() -> None:
    """Makes both known to transformers; again after a library has wrapped every attention function it found."""
    AttentionInterface.register(NAME, _attention)
    ALL_ATTENTION_FUNCTIONS[NAME] = _attention  # a wrapper is put here, where it hides what is registered
    AttentionMaskInterface.register(NAME, _mask)


register()


def set_probe(module: nn.Module, probe: Probe | None) -> None:
    """A probe that stays until it is taken away with None; for who has changed the module's projections."""
    if probe is None:
        _PROBES.pop(module, None)
    else:
        _PROBES[module] = probe


@contextmanager
def attending(model: Any) -> Iterator[None]:
    """Inside, the model attends through this file; it had another implementation before and has it again after."""
    before = model.config._attn_implementation
    register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def probing(model: Any, probes: Mapping[nn.Module, Probe]) -> Iterator[None]:
    """Inside, the attention modules that are named show what they attend with, or attend with something else."""
    if taken := [module for module in probes if module in _PROBES]:
        raise ValueError(f"{len(taken)} attention layers are being looked at already: finish that first")
    with attending(model):
        _PROBES.update(probes)
        try:
            yield
        finally:
            for module in probes:
                _PROBES.pop(module, None)
