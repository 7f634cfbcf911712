"""Registering diffusers hooks so that removing them leaves nothing behind."""

from __future__ import annotations

import itertools

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

_numbers = itertools.count()
_OURS = "_created_by_afterburner"


def unique_name(kind: str) -> str:
    """A hook name that no other handle uses, so that several can be attached at once."""
    return f"afterburner.{kind}.{next(_numbers)}"


def add_hook(module: nn.Module, hook: ModelHook, name: str, root: nn.Module | None = None) -> None:
    """Registers a diffusers hook as the module's outermost one.

    Args:
        root: the model that the module is part of, whose list of hooked children has to be renewed.
    """
    new = not hasattr(module, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if new:
        setattr(registry, _OURS, True)
    registry.register_hook(hook, name)
    _renew_children(module if root is None else root)


def remove_hook(module: nn.Module, name: str, root: nn.Module | None = None) -> None:
    """Removes a hook in any order relative to others; the last one takes the registry and `forward` override along."""
    registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
    if registry is None or name not in registry.hooks:
        return
    index = registry._hook_order.index(name)
    outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    outer_forward = outer.forward if outer is not None else None
    registry.remove_hook(name, recurse=False)
    if outer is not None and outer.original_forward is not None:
        # diffusers would put the inner forward in place of the outer hook's own: give it back, and relink below it.
        outer.original_forward, outer.forward = outer.forward, outer_forward
    if not registry.hooks:
        _drop_override(module)
        if getattr(registry, _OURS, False):
            del module._diffusers_hook
    _renew_children(module if root is None else root)


def _drop_override(module: nn.Module) -> None:
    override = module.__dict__.get("forward")
    if getattr(override, "__func__", None) is type(module).forward and getattr(override, "__self__", None) is module:
        del module.__dict__["forward"]


def _renew_children(root: nn.Module) -> None:
    registry: HookRegistry | None = getattr(root, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
