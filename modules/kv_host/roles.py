"""The parts of a causal language model that a KV cache is about, found by what they do and not by class name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention layer.

    Attributes:
        projections: (query, key, value), or the one that makes all three side by side in this order.
    """

    index: int
    module: nn.Module
    query_heads: int
    kv_heads: int
    head_dim: int
    projections: tuple[nn.Module, ...]

    @property
    def feature_width(self) -> int:
        """Width of a token's query, key and value side by side."""
        return (self.query_heads + 2 * self.kv_heads) * self.head_dim


def attention_sites(model: Any) -> tuple[AttentionSite, ...]:
    """The attention layers of a causal language model, in order.

    Raises:
        ValueError: it has none of the usual form, or not one per layer.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(model, "generate"):
        raise ValueError(f"a KV cache belongs to a causal language model of transformers, not to a {type(model)}")
    config = config.get_text_config(decoder=True)
    found = [site for module in model.modules() if (site := _site(module, config)) is not None]
    found.sort(key=lambda site: site.index)
    if [site.index for site in found] != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"{type(model).__name__} has {config.num_hidden_layers} layers, of which {len(found)} attend through "
            "q_proj, k_proj and v_proj (or qkv_proj) and o_proj: only such models can have their cache replaced"
        )
    return tuple(found)


def _site(module: nn.Module, config: Any) -> AttentionSite | None:
    index, head_dim = getattr(module, "layer_idx", None), getattr(module, "head_dim", None)
    if not isinstance(index, int) or not isinstance(head_dim, int) or not hasattr(module, "o_proj"):
        return None
    parts = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
    if None in parts:
        parts = (getattr(module, "qkv_proj", None),)
    projections = tuple(part for part in parts if isinstance(part, nn.Module))
    if len(projections) != len(parts):
        return None
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return AttentionSite(index, module, heads, kv_heads, head_dim, projections)


class FeatureTap:
    """Keeps what the query, key and value projections of a layer put out in the running forward, while `wanted`."""

    def __init__(self, site: AttentionSite) -> None:
        self.site, self.wanted = site, True
        self._outputs: dict[int, Tensor] = {}

    def take(self) -> Tensor:
        """Queries, keys and values of the new tokens side by side, before rotation, [B, T, F]; forgets them."""
        if len(self._outputs) < len(self.site.projections):
            raise ValueError(
                "the adapter of this cache is detached: attach it again, and go on with handle.resume(cache)"
            )
        outputs = [self._outputs.pop(place) for place in range(len(self.site.projections))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _keep(self, place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.wanted:
                self._outputs[place] = output.detach()

        return hook

    @contextmanager
    def listening(self) -> Iterator[FeatureTap]:
        """Listens while entered."""
        handles = self.start()
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def start(self) -> Sequence[Any]:
        """Begins to listen; returns what has to be removed to end it."""
        return [part.register_forward_hook(self._keep(i)) for i, part in enumerate(self.site.projections)]


def rotary_frequencies(model: Any) -> Tensor:
    """Radians per position of each rotated pair, [pairs]; the pairs are (i, i + pairs) of a head.

    Raises:
        ValueError: no rotary embedding, or one whose frequencies depend on the length of the text.
    """
    config = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    kind = str(ropes.get("rope_type", "default" if ropes.get("rope_theta") else "several"))
    found = [value for name, value in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    if len(found) != 1 or kind in ("dynamic", "longrope", "several"):
        raise ValueError(
            f"positions can be made compact only under one fixed rotary embedding, and {type(model).__name__} has "
            f"{'none' if not found else f'one of kind {kind}'}: use positions original"
        )
    frequencies: Tensor = found[0]
    return frequencies


@contextmanager
def rotated_as_a_whole(model: Any, length: int) -> Iterator[None]:
    """Inside, parts of a text of `length` tokens are rotated as the whole is.

    Under longrope a model rotates texts that are longer than its first training's in another way, and would take the
    first chunks for short texts.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed = []
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            if length > int(module.config.rope_parameters["original_max_position_embeddings"]):
                changed.append((module, module.original_inv_freq))
                whole, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=length)
                module.original_inv_freq = whole
    try:
        yield
    finally:
        for module, before in changed:
            module.original_inv_freq = before


def rotate(states: Tensor, shift: Tensor, frequencies: Tensor) -> Tensor:
    """Keys or queries [..., d] moved on by `shift` positions [...]: rotations compose, no unrotated copy is needed."""
    pairs = frequencies.numel()
    angle = shift[..., None].to(frequencies) * frequencies
    cos, sin = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
    first, second, rest = states[..., :pairs], states[..., pairs : 2 * pairs], states[..., 2 * pairs :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
