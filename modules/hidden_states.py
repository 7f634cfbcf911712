"""What a language model computes on the way: the outputs of single decoder layers, beside its last hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal language model of transformers, the first one first.

    Raises:
        ValueError: the model does not say which of its modules are layers.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP makes a class of its own of each module's, so the names of all bases count.
    layers = [module for module in model.modules() if kinds & {base.__name__ for base in type(module).__mro__}]
    if not layers:
        raise ValueError(f"a {type(model).__name__} does not name its decoder layers, whose outputs are asked for")
    return layers


def check_layers(numbers: Sequence[int], model: nn.Module) -> None:
    """Raise ValueError unless the model has decoder layers of these numbers, from 1."""
    count = len(decoder_layers(model)) if numbers else 0
    if numbers and not 1 <= min(numbers) <= max(numbers) <= count:
        raise ValueError(f"layers is {list(numbers)}, but a {type(model).__name__} has layers 1 to {count}")


@contextmanager
def tapped(model: nn.Module, numbers: Sequence[int]) -> Iterator[Mapping[int, Tensor]]:
    """Yields what the layers of these numbers, from 1, gave in the last call, each [B, T, D].

    Raises:
        ValueError: see `check_layers`.
    """
    check_layers(numbers, model)
    layers, outputs = decoder_layers(model) if numbers else [], dict[int, Tensor]()
    with ExitStack() as stack:
        for number in numbers:
            hook = layers[number - 1].register_forward_hook(partial(_keep, outputs, number))
            stack.callback(hook.remove)
        yield outputs


def _keep(outputs: dict[int, Tensor], number: int, module: nn.Module, args: Any, output: Any) -> None:
    outputs[number] = output if isinstance(output, Tensor) else output[0]


def side_by_side(last: Tensor, outputs: Mapping[int, Tensor], numbers: Sequence[int]) -> Tensor:
    """Features [B, T, (1 + n) D]: the last hidden state, then each layer's output scaled to a mean square of one.

    Of outputs of more tokens than `last` has the last ones are taken, as a prompt's are where only its end has logits.
    """
    rows = [outputs[number][:, -last.shape[1] :].to(last.device) for number in numbers]
    scaled = [functional.rms_norm(row.float(), row.shape[-1:]).to(last.dtype) for row in rows]
    return torch.cat([last, *scaled], dim=-1) if scaled else last
