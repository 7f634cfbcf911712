"""A peer of learned caches from an optional package: cache-dit's DBCache, with and without its Taylor calibrator."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from modules.pipelines import DiffusionDriver
from trainers.diffusion_cases import Probe, enough_everywhere, largest_threshold
from trainers.rows import Case

_WARMUPS = (2, 4, 6)

MISSING = (
    "cache-dit's DBCache is not measured here, because it is not installed: pip install 'afterburner[cache_dit]', "
    "or in a checkout pip install -e '.[cache_dit]'."
)
"""What the report says without the package."""


def installed() -> bool:
    """Whether cache-dit can be imported; it is not, since that takes seconds."""
    return importlib.util.find_spec("cache_dit") is not None


def dbcache_case(driver: DiffusionDriver, threshold: float, warmup: int, taylor: bool, steps: int, **call: Any) -> Case:
    """DBCache: while the first block's residual moves by less than `threshold`, the others are not run.

    Args:
        warmup: first steps that compute everything.
        taylor: the residual of the blocks that are not run is extrapolated in first order instead of held.
    """
    group = "DBCache with Taylor" if taylor else "DBCache"

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with _enabled(driver.pipe, threshold, warmup, taylor):
            yield {"num_inference_steps": steps, **call}

    return Case(name=f"{group} {threshold:.3g}, warm-up {warmup}", kind="peer", group=group, enter=enter)


def dbcache_cases(probe: Probe, target_blocks: float, steps: int, **call: Any) -> list[Case]:
    """DBCache without and with Taylor, each with the warm-up that comes closest on the probe's inputs.

    Thresholds are the largest that still execute `target_blocks`; settings that cannot are left out.
    """
    found = []
    for taylor in (False, True):

        def make(threshold: float, warmup: int, taylor: bool = taylor) -> Case:
            return dbcache_case(probe.driver, threshold, warmup, taylor, steps, **call)

        tried = []
        for warmup in _WARMUPS:
            threshold = largest_threshold(partial(make, warmup=warmup), probe, target_blocks)
            if threshold is not None:
                tried.append((probe.run(make(threshold, warmup))[1], threshold, warmup))
        if tried:
            _, threshold, warmup = max(tried)
            found.append(enough_everywhere(partial(make, warmup=warmup), probe, target_blocks, threshold))
    return [case for case in found if case is not None]


@contextmanager
def _enabled(pipe: Any, threshold: float, warmup: int, taylor: bool) -> Iterator[None]:
    import cache_dit

    for handler in logging.getLogger("CACHE_DIT").handlers:
        handler.setLevel(logging.ERROR)
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, residual_diff_threshold=threshold
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    model = pipe.transformer
    attributes, parts = dict(vars(model)), dict(model._modules)
    try:
        cache_dit.enable_cache(pipe, cache_config=settings, calibrator_config=calibrator)
        yield
    finally:
        cache_dit.disable_cache(pipe)
        # It leaves an overridden forward behind, and at DiT a second name for the time embedding.
        model._modules.clear()
        model._modules.update(parts)
        for name in set(vars(model)) - set(attributes):
            del vars(model)[name]
        vars(model).update(attributes)
