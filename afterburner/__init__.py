"""Learned acceleration modules for frozen backbones: the public facade over the folders beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.contracts import Handle

__all__ = ["__version__", "cacheable", "load_adapter"]
__version__ = "0.1.0"


def load_adapter(target: Any, adapter: str | Path, *, revision: str | None = None) -> Handle:
    """Attach an exported adapter to a frozen pipeline or model.

    Args:
        target: a diffusers pipeline or the model itself, as its own library loaded it.
        adapter: an adapter folder, or a Hub id (JSON, safetensors and card are fetched, nothing is executed; if the
            Hub does not answer, the cached copy is taken, with a warning).
        revision: commit, tag or branch of a Hub id; a commit never changes.
    Returns:
        the handle: `pipe(..., **handle.call_kwargs)` runs accelerated, `handle.detach()` undoes everything.
    Raises:
        ValueError: the adapter is damaged, or was made for something else; one sentence names the difference.
    """
    from checkpoints.load import load_adapter as load  # torch is loaded when an adapter is, not by this import

    return load(target, adapter, revision=revision)


def cacheable(target: Any) -> Handle:
    """Give a pipeline's transformer diffusers' `enable_cache`, which also takes an adapter, and what belongs to it.

    For classes that lack diffusers' `CacheMixin` (DiT, PixArt).  The library's own configurations work there too.

    Args:
        target: a diffusers pipeline, or its transformer.
    Returns:
        a handle whose `detach` gives the transformer its own class back.
    """
    from checkpoints.load import load_adapter as load
    from modules.cache_mixin import make_cacheable

    return make_cacheable(target, load)
