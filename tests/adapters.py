"""A tiny backbone, the manifest of an adapter for it, and what every refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints.manifest import AdapterError, Manifest, describe, fingerprint


class Backbone(nn.Module):
    """Three layers and a config, as both libraries have them."""

    def __init__(self, num_layers: int = 3, width: int = 24, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.config = {"num_layers": num_layers, "hidden_size": width, "eps": 1e-6, "_name_or_path": "x"}


def manifest_for(backbone: Backbone) -> Manifest:
    return Manifest(
        method="fake",
        module={"span": 2},
        base_model_name_or_path="embedded:tiny",
        base_model_fingerprint=fingerprint(backbone),
        base_model_config=describe(backbone),
        valid_for={"dtype": ["float32"], "timesteps": [900, 400], "guidance": 4.5, "scheduler": {"class": "DDIM"}},
        made_by={"recipe": "fake_tiny", "steps": 3},
    )


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the AdapterError that the call must raise: one line, one sentence."""
    with pytest.raises(AdapterError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".") and ". " not in message.replace("...", "")
    return message
