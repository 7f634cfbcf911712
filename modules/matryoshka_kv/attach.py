"""MatryoshkaKV at work in a model: from an adapter's tensors to a narrower cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modules.contracts import AdapterEntry
from modules.kv_host import KVHandle
from modules.kv_host.projection import ProjectionCodec
from modules.lora import attach_lora, remove_lora, split_lora
from modules.matryoshka_kv.config import MatryoshkaConfig
from modules.matryoshka_kv.merge import MergedValues


class MatryoshkaHandle(KVHandle):
    """Trained projections at work in a model's cache; `handle.use_budget(0.375)` stores other ranks.

    Attributes:
        config: the adapter's.
        projections: what stores.
    """

    def __init__(self, model: Any, codec: ProjectionCodec, config: MatryoshkaConfig) -> None:
        super().__init__(model, None, codec, None)
        self.config, self.projections = config, codec
        self._changed = model if config.lora else None
        self._merged: MergedValues | None = None

    def use_budget(self, budget: float | str) -> None:
        """Ranks of another budget that the adapter has; 1.0 or `full` is full rank: the model's own cache.

        LoRA, where the adapter has it, stays in the model at any of them.

        Caches that exist keep their ranks; merged projections become the model's own again.
        """
        table = self.config.table(budget)
        self.unmerge()
        self.projections.use(table)

    def merge(self) -> None:
        """Folds the values' bases into the model's value and output projections, for the ranks in use.

        Raises:
            ValueError: the model makes query, key and value in one projection, or a selector reads its projections.
        """
        self.unmerge()
        selector = self.host.selector
        if selector is not None and selector.needs_features:
            raise ValueError(
                f"a {type(selector).__name__} reads what the projections put out: detach it before merging"
            )
        self._merged = MergedValues(self.host.sites, self.projections)
        self.host.packed = self._merged.packed

    def unmerge(self) -> None:
        """Gives the model its own projections back; does nothing where none are merged."""
        if self._merged is not None:
            self._merged.undo()
            self._merged, self.host.packed = None, {}

    def detach(self) -> None:
        """See `KVHandle.detach`; the model has its own layers again."""
        self.unmerge()
        if self._changed is not None:
            remove_lora(self._changed)
            self._changed = None
        super().detach()


def attach(target: Any, manifest: AdapterEntry, tensors: dict[str, Tensor]) -> MatryoshkaHandle:
    """Attaches an exported adapter to a causal language model of transformers: its cache stores fewer coordinates.

    LoRA that was trained beside the projections is put into the model's linear layers.

    Raises:
        ValueError: the adapter does not fit this model.
    """
    config = MatryoshkaConfig(**manifest.module)
    if not isinstance(target, nn.Module) or not hasattr(target, "generate"):
        raise ValueError(
            f"a matryoshka_kv adapter attaches to a causal language model, not to a {type(target).__name__}"
        )
    lora, own = split_lora(tensors)
    codec = codec_of(config, own, target)
    if config.lora is None:
        return MatryoshkaHandle(target, codec, config)
    attach_lora(target, config.lora, lora)
    try:
        return MatryoshkaHandle(target, codec, config)
    except ValueError:
        remove_lora(target)
        raise


def codec_of(config: MatryoshkaConfig, tensors: Mapping[str, Tensor], model: nn.Module) -> ProjectionCodec:
    """The codec of an adapter's tensors, on the model's device and in its dtype."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    keys, values, means = (tensors[name].to(like) for name in ("keys", "values", "means"))
    return ProjectionCodec(keys, values, means, config.table(config.budget))
