"""What a method may train of a backbone itself: LoRA on its linear layers, through PEFT, which can be switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

_NAME = "afterburner"
_PREFIX = "lora."  # of its tensors in an adapter


def add_lora(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, nn.ModuleList]:
    """Puts LoRA into a model in place; what it adds is zero until trained.

    Args:
        settings: `rank`, `alpha`, `dropout` and `targets`, names of linear layers.
    Returns:
        by the layer's name its (A, B, dropout), which hold all that is new.
    Raises:
        ValueError: the model already has LoRA, or has no linear layer of such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if _layers(model):
        raise ValueError("the model already has LoRA layers: merge or unload them first")
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if missing := [target for target in settings["targets"] if target.rpartition(".")[2] not in linear]:
        raise ValueError(
            f"lora.targets names {missing[0]}, and the backbone has no linear layer of that name: it has "
            f"{', '.join(sorted(linear))}"
        )
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=list(settings["targets"]),
    )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for parameter in learning:  # PEFT freezes all that is not its own
        parameter.requires_grad_(True)
    return {
        name: nn.ModuleList([layer.lora_A[_NAME], layer.lora_B[_NAME], layer.lora_dropout[_NAME]])
        for name, layer in _layers(model).items()
    }


def remove_lora(model: nn.Module) -> None:
    """Gives the model its own layers back."""
    for name, layer in _layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        delattr(model, "peft_config")


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """The original backbone: these same weights without what LoRA adds."""
    layers = list(_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def lora_tensors(parts: Mapping[str, nn.ModuleList]) -> dict[str, Tensor]:
    """What was learned, by the names of an adapter."""
    found = {}
    for name, (down, up, _) in ((name, cast(Any, part)) for name, part in parts.items()):
        found[f"{_PREFIX}{name}.A"], found[f"{_PREFIX}{name}.B"] = down.weight.detach(), up.weight.detach()
    return found


@torch.no_grad()
def load_lora(parts: Mapping[str, nn.ModuleList], tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `lora_tensors`.  Raises ValueError where a name or a shape differs."""
    mine = lora_tensors(parts)
    if different := sorted(mine.keys() ^ tensors.keys()):
        raise ValueError(f"the adapter's LoRA and this backbone's layers differ in {different[0]}")
    for name, value in mine.items():
        if value.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} in the adapter and {tuple(value.shape)} here")
        value.copy_(tensors[name])


def split_lora(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter's tensors: LoRA's, and all others."""
    own = {name: value for name, value in tensors.items() if name.startswith(_PREFIX)}
    return own, {name: value for name, value in tensors.items() if name not in own}


def attach_lora(model: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts an adapter's LoRA into a model, frozen; `remove_lora` takes it out.

    Raises:
        ValueError: it does not fit the model, which then is as it was.
    """
    parts = add_lora(model, settings)
    try:
        load_lora(parts, tensors)
    except ValueError:
        remove_lora(model)
        raise
    for part in parts.values():
        part.requires_grad_(False).eval()


def weight_with_lora(layer: nn.Module) -> Tensor:
    """A linear layer's matrix [out, in], with what LoRA adds to it."""
    base = cast(Any, layer)
    if not hasattr(layer, "get_base_layer"):
        return cast(Tensor, base.weight)
    return cast(Tensor, base.get_base_layer().weight + base.get_delta_weight(_NAME))


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
