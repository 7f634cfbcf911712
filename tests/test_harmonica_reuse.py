"""What stands in for reused units, at every granularity: its reset, what blocks reuse, what adapters weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.harmonica import HarmoniCaConfig, RouterTable, attach_masks, predictor_of
from modules.reuse import Delta, Hold, Taylor
from tests.tiny import tiny_pipeline
from tests.tiny_harmonica import OPS, config_of, random_mask
from tests.tiny_ilf import INPUTS, SEEDS, driver_of, latents_of_call


# Property 8.
@pytest.mark.parametrize("granularity", ["submodule", "block", "model"])
@pytest.mark.parametrize("op", OPS)
def test_runs_do_not_hear_of_one_another(kind: str, op: str, granularity: str) -> None:
    """Two in a row, another batch size between them, and one that was cut short."""
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe, granularity, reuse_op=op)
    mask, router = random_mask(len(config.units), seed=3), RouterTable(config)
    mask[3] = granularity != "model"
    mask[4] = False
    with torch.no_grad():
        for row in router.corrections:
            row.add_(0.05 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    weights = router.forecast_weights(mask)[None] if op == "linear" else None
    with attach_masks(pipe, config, mask[None], weights) as handle:

        def latents(count: int, **call: Any) -> Tensor:
            return latents_of_call(running, INPUTS[kind][:count], SEEDS[:count], **handle.call_kwargs, **call)

        first, _ = latents(2), latents(3)
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            latents(2)
        pipe.scheduler.step = step
        assert torch.equal(first, latents(2)) and handle.reuse.memory_bytes() == 0


def test_of_whole_blocks_residuals_are_reused() -> None:
    assert type(predictor_of("hold")()) is Hold and type(predictor_of("hold", granularity="model")()) is Hold
    assert type(predictor_of("hold", granularity="block")()) is Delta
    found = predictor_of("taylor2", granularity="block")()
    assert isinstance(found, Taylor) and (found.order, found.feature) == (2, "residual")
    given, later = torch.ones(2), torch.full((2,), 10.0)
    for op in ("hold", "taylor1"):
        predictor = predictor_of(op, granularity="block")()
        predictor.observe(0, 0, (given,), (given + 3,))
        assert predictor.predict(0, 1, (later,))[0].tolist() == [13, 13]


@pytest.mark.parametrize(("op", "most"), [("hold", 64), ("linear", 1024)])
def test_an_adapter_for_dit_xl_weighs_little(op: str, most: int) -> None:
    """KiB of the tensors for 50 steps of 28 blocks with two parts, at three operating points."""
    units = [f"transformer_blocks.{i}.{part}" for i in range(28) for part in ("attn1", "ff")]
    config = HarmoniCaConfig(
        units=units, routed=list(range(1, 50)), timesteps=list(range(50)), guidance=1.5, reuse_op=op
    )
    router = RouterTable(config)
    masks = torch.stack([router.mask_at(share) for share in (0.5, 0.35, 0.65)])
    tensors = [torch.stack(list(router.logits)), masks]
    tensors += [torch.stack([router.forecast_weights(mask) for mask in masks])] if op == "linear" else []
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= most * 1024
