"""Where modules can attach: the blocks of a transformer, the sub-modules of a block, the streams that blocks carry."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from modules.contracts import Features

# Class name -> its lists of blocks, in call order.
_STACKS: dict[str, tuple[str, ...]] = {
    "DiTTransformer2DModel": ("transformer_blocks",),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
}
# Blocks that diffusers' TransformerBlockRegistry lacks: where hidden and encoder states are in the output.
_MORE_STREAMS: dict[str, tuple[int, int | None]] = {"JointTransformerBlock": (1, 0)}


@dataclass(frozen=True)
class Streams:
    """Which arguments and outputs of a block class are its streams: image only, or image and text side by side."""

    hidden_argument: int
    hidden_output: int
    encoder_argument: int | None = None
    encoder_output: int | None = None
    hidden_name: str = "hidden_states"
    encoder_name: str = "encoder_hidden_states"

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Features:
        """The streams among a call's arguments."""
        hidden = kwargs[self.hidden_name] if self.hidden_name in kwargs else args[self.hidden_argument]
        if self.encoder_argument is None:
            return (hidden,)
        encoder = kwargs[self.encoder_name] if self.encoder_name in kwargs else args[self.encoder_argument]
        return (hidden, encoder)

    def unpack(self, output: Any) -> Features:
        """The streams in a block's output."""
        if isinstance(output, Tensor):
            return (output,)
        if self.encoder_output is None:
            return (output[self.hidden_output],)
        return (output[self.hidden_output], output[self.encoder_output])

    def pack(self, streams: Features, kwargs: dict[str, Any]) -> Any:
        """The inverse of `unpack`: what the block would have returned to a call with these arguments."""
        if self.encoder_output is None:
            return streams[0]
        return streams if self.hidden_output < self.encoder_output else streams[::-1]


class ModelStreams(Streams):
    """A whole transformer as one unit: latents in, the prediction out, in the form that the call asked for."""

    def pack(self, streams: Features, kwargs: dict[str, Any]) -> Any:
        """A tuple, or the library's output class."""
        if not kwargs.get("return_dict", True):
            return streams
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return cast(Any, Transformer2DModelOutput)(sample=streams[0])

    def unpack(self, output: Any) -> Features:
        """The prediction."""
        return (output[0],)


def _streams(block: type[nn.Module]) -> Streams:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    if block.__name__ in _MORE_STREAMS:
        hidden_output, encoder_output = _MORE_STREAMS[block.__name__]
        hidden_name, encoder_name = "hidden_states", "encoder_hidden_states"
    else:
        known = TransformerBlockRegistry.get(block)
        hidden_output, encoder_output = known.return_hidden_states_index, known.return_encoder_hidden_states_index
        hidden_name, encoder_name = known.hidden_states_argument_name, known.encoder_hidden_states_argument_name
    arguments = list(inspect.signature(block.forward).parameters)[1:]
    encoder_argument = None if encoder_output is None else arguments.index(encoder_name)
    return Streams(
        arguments.index(hidden_name), hidden_output, encoder_argument, encoder_output, hidden_name, encoder_name
    )


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a transformer in call order, with their qualified names."""

    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def submodules(self, index: int) -> dict[str, nn.Module]:
        """The sub-modules of one block, see `submodules`."""
        return submodules(self.blocks[index])

    def streams(self, index: int) -> Streams:
        """How one block carries its streams."""
        return _streams(type(self.blocks[index]))


def submodules(block: nn.Module) -> dict[str, nn.Module]:
    """The parts of a block whose outputs can be reused before gate and residual, in call order.

    `attn1` (self-attention), `attn2` (text cross-attention, PixArt only), `ff`.

    Raises:
        ValueError: the block has none of them.
    """
    found = {name: part for name in ("attn1", "attn2", "ff") if (part := getattr(block, name, None)) is not None}
    if "attn1" not in found:
        raise ValueError(
            f"a {type(block).__name__} has no attn1, attn2 or ff to take apart: use block granularity, "
            "or the blocks of a DiTTransformer2DModel or PixArtTransformer2DModel"
        )
    return found


def finest_granularity(transformer: nn.Module) -> Literal["submodule", "block"]:
    """What can be reused at least: parts of blocks, or whole blocks where those cannot be taken apart."""
    try:
        for block in block_stack(transformer).blocks:
            submodules(block)
    except ValueError:
        return "block"
    return "submodule"


def last_linears(block: nn.Module) -> tuple[nn.Module, ...]:
    """Of each part of a block the linear layer that runs last, whether or not the part can be reused on its own.

    Flux: joint attention and both feed-forward parts of a double block; of a single block its one output projection.

    Raises:
        ValueError: the block has no such parts.
    """
    names = ("attn1", "attn2", "attn", "ff", "ff_context")
    parts = [part for name in names if (part := getattr(block, name, None)) is not None]
    found = [last for part in parts if (last := _last_linear(part)) is not None]
    # A projection of the block's own comes after its parts, and takes in what they give.
    if isinstance(own := getattr(block, "proj_out", None), nn.Linear):
        found = [own]
    if not found:
        raise ValueError(f"a {type(block).__name__} has no attention or feed-forward part whose work could be counted")
    return tuple(found)


def _last_linear(part: nn.Module) -> nn.Module | None:
    if isinstance(to_out := getattr(part, "to_out", None), nn.ModuleList):
        return to_out[0]
    layers = getattr(part, "net", None)
    return None if layers is None else [layer for layer in layers if not isinstance(layer, nn.Dropout)][-1]


def find_transformer(target: Any) -> nn.Module:
    """The transformer of a pipeline, or the model itself, without torch.compile's wrapper.

    Raises:
        TypeError: the target is neither.
        ValueError: its class is not supported.
    """
    from diffusers.utils.torch_utils import unwrap_module

    given = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    model = cast(Any, unwrap_module)(given)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a {type(target).__name__} has no transformer: give a diffusers pipeline "
            f"or a {' or '.join(sorted(_STACKS))}"
        )
    _block_lists(model)
    return model


def _block_lists(transformer: nn.Module) -> tuple[str, ...]:
    for base in type(transformer).__mro__:
        if base.__name__ in _STACKS:
            return _STACKS[base.__name__]
    raise ValueError(f"a {type(transformer).__name__} is not supported: modules attach to {', '.join(sorted(_STACKS))}")


def block_stack(transformer: nn.Module) -> BlockStack:
    """The blocks of a transformer.

    Raises:
        ValueError: its class is not supported.
    """
    named = [
        (f"{stack}.{index}", block)
        for stack in _block_lists(transformer)
        for index, block in enumerate(transformer.get_submodule(stack).children())
    ]
    return BlockStack(tuple(block for _, block in named), tuple(name for name, _ in named))
