"""Blocks, sub-modules and streams are found, and work is counted as executed, whoever skips the rest."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import nn

from modules.diffusion_host import WorkCounter, attach_reuse
from modules.reuse import Hold, StepTable
from modules.sites import Streams, _streams, block_stack, find_transformer, submodules
from tests.tiny import cache_context, forward, tiny_pixart, tiny_pixart_pipeline, tiny_transformer


def test_every_block_and_sub_module_is_found(kind: str) -> None:
    stack = block_stack(tiny_transformer(kind, layers=3))
    names = ["attn1", "attn2", "ff"] if kind == "pixart" else ["attn1", "ff"]
    assert stack.names == ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2")
    assert [list(stack.submodules(i)) for i in range(3)] == [names] * 3


def test_every_block_matters_in_the_tiny_models(kind: str) -> None:
    model = tiny_transformer(kind)
    want = forward(model, kind)
    for part in [part for block in block_stack(model).blocks for part in submodules(block).values()]:
        remover = part.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        assert not torch.allclose(forward(model, kind), want, rtol=1e-3)
        remover.remove()


def test_targets_without_a_supported_transformer_are_refused() -> None:
    with pytest.raises(TypeError, match="a Tensor has no transformer: give a diffusers pipeline or a DiTTransformer"):
        find_transformer(torch.zeros(1))
    with pytest.raises(ValueError, match="a Linear is not supported: modules attach to DiTTransformer2DModel, Flux"):
        find_transformer(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a Linear has no attn1, attn2 or ff"):
        submodules(nn.Linear(1, 1))


def test_pipelines_models_and_compiled_models_lead_to_the_same_transformer() -> None:
    pipe = tiny_pixart_pipeline()
    assert (
        find_transformer(pipe)
        is find_transformer(pipe.transformer)
        is find_transformer(torch.compile(pipe.transformer))
    )


@pytest.mark.parametrize(
    ("block", "double"), [(BasicTransformerBlock, 0), (FluxTransformerBlock, 1), (JointTransformerBlock, 1)]
)
def test_streams_read_and_rebuild_what_a_block_takes_and_returns(block: type[nn.Module], double: int) -> None:
    hidden, text = torch.zeros(1), torch.ones(1)
    streams = _streams(block)
    want = (hidden, text)[: 1 + double]
    assert streams.read((), {"hidden_states": hidden, "encoder_hidden_states": text}) == want
    output = (text, hidden) if double else hidden
    assert streams.unpack(output) == want and streams.pack(streams.unpack(output), {}) == output
    arguments = list(inspect.signature(block.forward).parameters)[1:]
    positional = tuple({"hidden_states": hidden, "encoder_hidden_states": text}.get(name) for name in arguments)
    assert streams.read(positional, {}) == want


def test_streams_in_image_first_order() -> None:
    streams = Streams(0, 0, 1, 1)
    pair = (torch.zeros(1), torch.ones(1))
    assert streams.unpack(pair) == streams.pack(pair, {}) == pair


# ---- counting work


def test_a_full_forward_counts_every_block_once(kind: str) -> None:
    model = tiny_transformer(kind)
    with WorkCounter(model) as counter:
        forward(model, kind)
        assert counter.work() == {"blocks": 4, "submodules": 12 if kind == "pixart" else 8, "macs": counter.macs}
        once = counter.macs
        forward(model, kind, batch=4)
        assert counter.macs == 3 * once and counter.blocks == 8
        counter.reset()
        assert counter.work() == {"blocks": 0, "submodules": 0, "macs": 0}
        counter.also(copy.deepcopy(tiny_transformer(kind).transformer_blocks[0]))
    forward(model, kind)
    assert counter.blocks == 0


def test_macs_agree_with_a_count_by_hand() -> None:
    model, batch, tokens, text, width = tiny_pixart(layers=2), 3, 16, 5, 16
    with WorkCounter(model) as counter:
        forward(model, "pixart", batch)
    block = tokens * (4 + 2 + 8) * width**2 + text * 2 * width**2  # self, cross, mlp; keys and values of the text
    embedding = 256 * width + width**2 + 6 * width**2  # two layers of the timestep, one to shifts and scales
    caption = text * (12 * width + width**2)
    assert counter.macs == batch * (2 * block + embedding + caption + tokens * width * 2 * 2 * 8)


def test_also_counts_a_block_outside(kind: str) -> None:
    model = tiny_transformer(kind)
    extra = copy.deepcopy(model.transformer_blocks[0])
    with WorkCounter(model) as counter:
        counter.also(extra)
        model.transformer_blocks[1].register_forward_hook(lambda module, args, out: extra(out, **kept))
        kept: dict[str, Any] = {}
        if kind == "pixart":
            kept = {"encoder_hidden_states": torch.zeros(2, 5, 16), "timestep": torch.zeros(2, 96)}
        else:
            kept = {"timestep": torch.full((2,), 5), "class_labels": torch.zeros(2, dtype=torch.long)}
        forward(model, kind)
    assert counter.blocks == 5


def test_what_others_skip_is_not_counted(kind: str) -> None:
    model = tiny_transformer(kind)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e9))
    with WorkCounter(model) as counter, cache_context(model, "cond"):
        forward(model, kind), forward(model, kind)
    assert counter.blocks == 4 + 1


def test_a_skipped_attention_skips_its_keys_and_values() -> None:
    model, table = tiny_pixart(), torch.ones(2, 12, dtype=torch.bool)
    table[1, 1] = False  # attn2 of the first block
    with WorkCounter(model) as counter, attach_reuse(model, StepTable(table), Hold(), "submodule"):
        forward(model, "pixart")
        full = counter.macs
        forward(model, "pixart")
    assert 2 * full - counter.macs == 2 * (16 * 2 * 16**2 + 5 * 2 * 16**2)
    assert counter.blocks == pytest.approx(8 - 1 / 3)
