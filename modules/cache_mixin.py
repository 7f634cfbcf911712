"""diffusers' `enable_cache` for transformers whose class lacks it (DiT, PixArt); it takes adapters, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.cache_utils import CacheMixin
from torch import nn

from modules.contracts import Handle
from modules.diffusion_host import StepClock
from modules.sites import find_transformer

Load = Callable[[Any, Any], Handle]
"""(target, adapter) -> the attached adapter's handle."""


class LearnedCacheMixin(CacheMixin):  # type: ignore[misc]
    """`enable_cache` takes an adapter too, and the library's caches run without a pipeline that opens a cache context.

    Attributes:
        learned_cache: handle of the adapter that is enabled, or None.
    """

    learned_cache: Handle | None = None
    _cache_target: Any = None
    _cache_load: Load | None = None
    _cache_clock: StepClock | None = None
    _inside_context = False

    def enable_cache(self, config: Any) -> Handle | None:
        """Enables an adapter (a folder or a Hub id), or one of the library's cache configurations.

        Returns:
            the adapter's handle; None for the library's own.
        Raises:
            ValueError: a cache is enabled already, or the adapter or configuration is refused.
        """
        if self.learned_cache is not None:
            raise ValueError("an adapter is enabled already: call disable_cache first")
        if not hasattr(config, "__fspath__") and not isinstance(config, str):
            cast(Any, super()).enable_cache(config)
            self._cache_clock = StepClock(self._cache_target)
            self._cache_clock.on_begin(self._forget)
            return None
        if self.is_cache_enabled:
            raise ValueError("one of the library's caches is enabled already: call disable_cache first")
        self.learned_cache = cast(Load, self._cache_load)(self._cache_target, config)
        return self.learned_cache

    def disable_cache(self) -> None:
        """Takes the enabled cache away."""
        if self.learned_cache is not None:
            self.learned_cache.detach()
            self.learned_cache = None
            return
        if self._cache_clock is not None:
            self._cache_clock.detach()
            self._cache_clock = None
        cast(Any, super()).disable_cache()

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """See diffusers."""
        self._inside_context = True
        try:
            with cast(Any, super()).cache_context(name, **kwargs):
                yield
        finally:
            self._inside_context = False

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # Pipelines call this after every run; without hooks it would leave an empty registry behind.
        if hasattr(self, "_diffusers_hook"):
            cast(Any, super())._reset_stateful_cache(recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own, inside a cache context where one of the library's caches needs one."""
        if self._inside_context or not self.is_cache_enabled:
            return cast(Any, super()).forward(*args, **kwargs)
        with self.cache_context("cond"):
            return cast(Any, super()).forward(*args, **kwargs)

    def _forget(self) -> None:
        # These classes' pipelines do not reset what the hooks of blocks remember of the last trajectory.
        for part in cast(nn.Module, self).modules():
            registry = getattr(part, "_diffusers_hook", None)
            if part is not self and registry is not None:
                registry.reset_stateful_hooks(recurse=False)


class CacheableHandle(Handle):
    """Undoes `make_cacheable`."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def detach(self) -> None:
        """Disables what is enabled, and gives the transformer its own class back."""
        model = self.transformer
        if not isinstance(model, LearnedCacheMixin):
            return
        if model.learned_cache is not None or model.is_cache_enabled:
            model.disable_cache()
        for name in (
            "learned_cache",
            "_cache_target",
            "_cache_load",
            "_cache_clock",
            "_inside_context",
            "_cache_config",
        ):
            model.__dict__.pop(name, None)
        model.__class__ = type(model).__bases__[1]


def make_cacheable(target: Any, load: Load) -> CacheableHandle:
    """Gives a pipeline's transformer, or a transformer, `enable_cache` and what belongs to it.

    The instance's class becomes a subclass of the same name, so that saving and `isinstance` go on as before.

    Args:
        target: with a pipeline, its scheduler tells when a trajectory begins; without, `_reset_stateful_cache` does.
        load: how adapters are attached.
    """
    model: Any = find_transformer(target)
    if not isinstance(model, LearnedCacheMixin):
        own = type(model)
        members = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        model.__class__ = type(own.__name__, (LearnedCacheMixin, own), members)
    # Past nn.Module's own bookkeeping, which would make the pipeline's parts the transformer's.
    model.__dict__.update(_cache_target=target, _cache_load=load)
    return CacheableHandle(model)
