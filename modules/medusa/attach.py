"""Medusa at work in a model: from an adapter's tensors to a faster `model.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from modules.contracts import AdapterEntry, Drafter
from modules.decode_host.attach import DecodeHandle
from modules.decode_host.generate import DraftedDecoding
from modules.decode_host.rules import Rule
from modules.lora import attach_lora, remove_lora, split_lora
from modules.medusa.config import MedusaConfig
from modules.medusa.drafter import MedusaDrafter
from modules.medusa.heads import MedusaHeads, check_shape
from modules.medusa.output_layer import OutputLayer
from modules.medusa.stacked import StackedHeads


class MedusaHandle(DecodeHandle):
    """Medusa at work in a model's `generate`.

    Attributes:
        config: the adapter's, with its calibrated tree, hits and counts.
        medusa: the heads as a drafter; `medusa.use_tree(choices)` drafts another tree, `medusa.use_tree([])` none.
    """

    def __init__(self, model: Any, drafter: MedusaDrafter, config: MedusaConfig, sampling: Rule | None = None) -> None:
        super().__init__(model, DraftedDecoding(drafter, sampling))
        self.config, self.medusa = config, drafter
        self._changed = model if config.lora else None

    def draft_with(self, drafter: Drafter) -> None:
        """Let another drafter guess from now on, for example `Hybrid(handle.medusa, PromptLookup())`."""
        self.drafter = self._decoding.drafter = drafter

    def detach(self) -> None:
        """Gives the model its own `generate` back, and its own layers (Medusa-2)."""
        super().detach()
        if self._changed is not None:
            remove_lora(self._changed)
            self._changed = None


def attach_heads(model: Any, heads: MedusaHeads, layer: OutputLayer | None = None) -> MedusaHandle:
    """Lets heads in the backbone's dtype draft for it, in the tree of their config.

    Args:
        layer: the model's output layer, if it is known already.
    Raises:
        ValueError: they do not fit the model, or its `generate` is replaced already.
    """
    layer = OutputLayer.of(model) if layer is None else layer
    check_shape(heads.config, layer)
    drafter = MedusaDrafter.of(StackedHeads(heads, layer), heads.config)
    return MedusaHandle(model, drafter, heads.config)


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> MedusaHandle:
    """Attaches an exported adapter to a causal language model of transformers: its `generate` just gets faster.

    Greedy text is that of the model alone (Medusa-1) or of the model with the adapter's LoRA (Medusa-2), and sampled
    text has the same law.

    Raises:
        ValueError: the adapter does not fit this model.
    """
    config = MedusaConfig(**manifest.module)
    if not isinstance(target, nn.Module) or not hasattr(target, "get_output_embeddings"):
        raise ValueError(f"a medusa adapter attaches to a causal language model, not to a {type(target).__name__}")
    lora, own = split_lora(tensors)
    heads = heads_of(config, own, target)
    if config.lora is None:
        return attach_heads(target, heads)
    attach_lora(target, config.lora, lora)
    try:
        return attach_heads(target, heads)
    except ValueError:
        remove_lora(target)
        raise


def heads_of(config: MedusaConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> MedusaHeads:
    """Heads with an adapter's tensors, frozen, on the model's device and in its dtype.

    Raises:
        ValueError: the tensors are not those of heads of this config.
    """
    with torch.device("meta"):  # every value is about to be replaced
        heads = MedusaHeads(config)
    _check_names(heads, tensors)
    heads.load_state_dict(dict(tensors), assign=True)
    matrix = cast(Any, model).get_output_embeddings().weight
    dtype = matrix.dtype if matrix.is_floating_point() else None  # quantised
    return heads.to(device=matrix.device, dtype=dtype).requires_grad_(False).eval()


def _check_names(heads: MedusaHeads, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(value.shape) for name, value in heads.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if strange := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        name = strange[0]
        raise ValueError(
            f"the adapter's {name} is {given.get(name, 'missing')}, and heads as its manifest says have "
            f"{wanted.get(name, 'no such tensor')} ({len(strange)} such): train it again with this version"
        )


def module_entry(config: MedusaConfig) -> dict[str, Any]:
    """The config as JSON values, for the manifest."""
    return asdict(config)
