"""`enable_cache` on transformers whose class lacks it: for adapters, and for the library's own caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig, PixArtTransformer2DModel

from afterburner import cacheable, load_adapter
from modules.diffusion_host import WorkCounter, attach_reuse
from modules.pipelines import driver, load_pipeline
from modules.reuse import Delta, FirstBlockTest
from tests.tiny import generate, tiny_pipeline
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_ilf import INPUTS, SEEDS, hooked
from trainers.training import build_task


def test_an_adapter_is_enabled_as_the_library_enables_its_caches(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny(kind, tmp_path, monkeypatch)
    build_task(tiny_recipe(name)).export_adapter(tmp_path / "adapter")
    pipe = load_pipeline(name)
    running, before = driver(pipe, name), sorted(vars(pipe.transformer))
    with load_adapter(pipe, tmp_path / "adapter") as handle:
        call = handle.call_kwargs
        want = running.generate(INPUTS[kind], SEEDS, **call)
    plain = running.generate(INPUTS[kind], SEEDS, **call)
    with cacheable(pipe):
        assert running.generate(INPUTS[kind], SEEDS, **call).equal(plain)
        assert pipe.transformer.enable_cache(str(tmp_path / "adapter")).call_kwargs == call
        with pytest.raises(ValueError, match="call disable_cache first"):
            pipe.transformer.enable_cache(tmp_path / "adapter")
        assert running.generate(INPUTS[kind], SEEDS, **call).equal(want)
        pipe.transformer.disable_cache()
        assert running.generate(INPUTS[kind], SEEDS, **call).equal(plain)
        pipe.transformer.enable_cache(tmp_path / "adapter")
    assert hooked(pipe) == [] and sorted(vars(pipe.transformer)) == before
    assert not hasattr(pipe.transformer, "enable_cache")


def test_the_class_keeps_its_name_and_its_kin(kind: str, tmp_path: Path) -> None:
    own = {"pixart": PixArtTransformer2DModel, "dit": DiTTransformer2DModel}[kind]
    pipe = tiny_pipeline(kind)
    handle = cacheable(pipe)
    assert isinstance(pipe.transformer, own) and type(pipe.transformer).__name__ == own.__name__
    pipe.transformer.save_pretrained(tmp_path)
    again = own.from_pretrained(tmp_path)
    assert again.state_dict().keys() == pipe.transformer.state_dict().keys()
    handle.detach()
    assert type(pipe.transformer) is own
    handle.detach()


def test_the_librarys_first_block_cache_works_and_forgets_the_last_run(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    plain = generate(pipe)
    with attach_reuse(pipe, FirstBlockTest(0.5), Delta(), "span"):
        want = generate(pipe)
    with cacheable(pipe), WorkCounter(pipe) as counter:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        first, again = generate(pipe), generate(pipe)
        assert torch.equal(first, want) and torch.equal(again, want)
        assert counter.blocks < 2 * 6 * 4
        with pytest.raises(ValueError, match="library's caches is enabled already"):
            pipe.transformer.enable_cache("somewhere")
        pipe.transformer.disable_cache()
        assert torch.equal(generate(pipe), plain)
    assert "enable_cache" not in dir(pipe.transformer) and "set_timesteps" not in vars(pipe.scheduler)
