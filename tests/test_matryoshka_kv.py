"""Trained projections: orthogonal whatever happens, PCA at the start, nested, and really narrower in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from modules.kv_host import CachePolicy, HeadGroup, attach_cache, attention_sites
from modules.kv_host.interface import probing
from modules.kv_host.projection import Moments, ProjectionCodec, principal_bases, uniform_ranks
from modules.matryoshka_kv import (
    MatryoshkaConfig,
    MatryoshkaHandle,
    MatryoshkaProjections,
    draw_masks,
    projecting_probe,
    rank_masks,
)
from modules.token_selectors import ExpectedAttention, KeyNorm
from tests.tiny_kv import save_tiny, tiny_recipe
from tests.tiny_kv_models import CONFIGS, greedy, logits_behind, some_ids, tiny_model
from trainers.training import build_task

RAGGED = (((2, 8), (4, 6)), ((8, 8), (2, 4)))  # layer 0: keys 2 and 8, values 4 and 6 of 8


def moments_of(model: Any) -> Moments:
    return principal_bases(model, attention_sites(model), [{"input_ids": some_ids(4, 40, seed=9)}])


def turned(moments: Moments, size: float = 0.3) -> MatryoshkaProjections:
    """Projections as after some training."""
    projections = MatryoshkaProjections(moments)
    torch.manual_seed(0)
    torch.nn.init.normal_(projections.skew, std=size)
    torch.nn.init.normal_(projections.means, std=size)
    return projections


@torch.no_grad()
def codec_for(projections: MatryoshkaProjections, ranks: Any, dtype: torch.dtype = torch.float32) -> ProjectionCodec:
    bases = projections()
    if dtype == torch.float64:  # orthogonal to its precision
        bases = torch.linalg.qr(bases.double())[0]
    return ProjectionCodec(bases[:, 0], bases[:, 1], projections.means.detach().to(dtype), ranks)


# What is stored.


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_rank_is_the_model_itself(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(family, dtype=dtype), some_ids(2, 40)
    size, moments = attention_sites(model)[0].head_dim, moments_of(tiny_model(family))
    with torch.no_grad():
        want = model(ids).logits
    # All columns, really projected, before training and after, and the shortcut that stores units as they are.
    stages = (MatryoshkaProjections(moments), turned(moments))
    start, everything = (codec_for(one, full(model, size), dtype) for one in stages)
    shortcut = everything.groups(0)[0]
    assert shortcut.key_basis is None and shortcut.value_basis is None
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for codec in (everything, Forced(start), Forced(everything)):
        with attach_cache(model, codec=codec) as handle:
            got = logits_behind(model, handle.cache(), ids)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


class Forced(ProjectionCodec):
    """Projects at full rank too."""

    def __init__(self, like: ProjectionCodec) -> None:
        super().__init__(like.keys, like.values, like.means, like.ranks)

    def groups(self, layer: int) -> Any:
        heads = tuple(range(self.keys.shape[1]))
        return (HeadGroup(heads, self.keys[layer], self.values[layer], self.means[layer]),)


def full(model: Any, size: int) -> Any:
    return uniform_ranks(attention_sites(model), size)


def test_bytes_are_ranks_times_tokens_with_ragged_ranks() -> None:
    model, ids = tiny_model(), some_ids(3, 30)
    with attach_cache(model, codec=codec_for(turned(moments_of(model)), RAGGED)) as handle:
        cache = handle.cache()
        logits_behind(model, cache, ids)
    assert cache.memory_bytes() == 3 * 30 * 4 * (2 + 8 + 4 + 6 + 8 + 8 + 2 + 4)
    plain = DynamicCache(config=model.config)
    model(ids, past_key_values=plain)
    with attach_cache(model, codec=codec_for(turned(moments_of(model)), full(model, 8))) as handle:
        cache = handle.cache()
        logits_behind(model, cache, ids)
    assert cache.memory_bytes() == sum(t.untyped_storage().nbytes() for x in plain.layers for t in (x.keys, x.values))


def test_a_smaller_rank_is_the_beginning_of_a_larger_one() -> None:
    model, ids = tiny_model(num_hidden_layers=1), some_ids(1, 30)
    projections = turned(moments_of(model))
    parts = []
    for rank in (4, 6):
        with attach_cache(model, codec=codec_for(projections, uniform_ranks(attention_sites(model), rank))) as handle:
            cache = handle.cache()
            logits_behind(model, cache, ids)
            parts.append(cache.layers[0].units.parts[0])
    for small, large in zip(*parts, strict=True):
        assert small.shape[-1] == 4 and large.shape[-1] == 6
        torch.testing.assert_close(small, large[..., :4], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-9)], ids=str)
def test_zeroed_coordinates_and_stored_ones_agree(dtype: torch.dtype, tolerance: float) -> None:
    model, ids = tiny_model(dtype=dtype), some_ids(2, 30)
    projections = turned(moments_of(tiny_model()))
    codec = codec_for(projections, RAGGED, dtype)
    task = Attending(model, codec)
    want = task.logits(ids, rank_masks(torch.tensor(RAGGED), 8).to(dtype))
    with attach_cache(model, codec=codec) as handle:
        torch.testing.assert_close(logits_behind(model, handle.cache(), ids), want, rtol=tolerance, atol=tolerance)
        cache = handle.cache()
        one_by_one = torch.cat([logits_behind(model, cache, ids[:, t : t + 1]) for t in range(30)], dim=1)
    torch.testing.assert_close(one_by_one, want, rtol=0, atol=max(1e-4, tolerance))


class Attending:
    """The training graph's attention, without its task."""

    def __init__(self, model: Any, codec: ProjectionCodec) -> None:
        self.model, self.codec = model, codec

    @torch.no_grad()
    def logits(self, ids: Tensor, masks: Tensor) -> Tensor:
        codec = self.codec
        probes = {
            site.module: projecting_probe(site, torch.stack([codec.keys[i], codec.values[i]]), codec.means[i], masks[i])
            for i, site in enumerate(attention_sites(self.model))
        }
        with probing(self.model, probes):
            return self.model(ids).logits


def test_a_constant_in_all_keys_changes_nothing() -> None:
    """Why keys have no means: softmax drops what all keys of a query have in common."""
    model, ids = tiny_model(num_hidden_layers=1), some_ids(1, 20)
    projections = turned(moments_of(model))
    codec = codec_for(projections, full(model, 8))

    class Shifted(Forced):
        def groups(self, layer: int) -> Any:
            (group,) = super().groups(layer)
            encode = type(group).encode

            class Moved(type(group)):
                def encode(self, keys: Tensor, *rest: Any) -> Any:
                    return encode(self, keys + 3.0, *rest)

            return (Moved(group.heads, group.key_basis, group.value_basis, group.value_mean),)

    got = []
    for one in (Forced(codec), Shifted(codec)):
        with attach_cache(model, codec=one) as handle:
            got.append(logits_behind(model, handle.cache(), ids))
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral with a window"])
def test_merged_projections_give_the_same_logits(family: str) -> None:
    model, ids = tiny_model(family), some_ids(2, 30)
    config = MatryoshkaConfig(num_layers=2, kv_heads=2, head_dim=8, interval=2, ranks={"0.5": RAGGED})
    handle = MatryoshkaHandle(model, codec_for(turned(moments_of(model)), RAGGED), config)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    want, parts = logits_behind(model, handle.cache(), ids), [ids[:, :20], ids[:, 20:]]
    handle.merge()
    assert model.model.layers[1].self_attn.o_proj.in_features == 2 * (2 + 4)
    cache = handle.cache()
    got = torch.cat([logits_behind(model, cache, part) for part in parts], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # Calls without a cache of ours still make sense: values lose what the ranks leave out, keys nothing.
    cached = DynamicCache(config=model.config)
    with torch.no_grad():
        together = model(ids).logits
        apart = torch.cat([model(part, past_key_values=cached).logits for part in parts], dim=1)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no longer put out what this selector reads"):
        attach_cache(model, selector=ExpectedAttention(model))
    handle.use_budget("full")
    torch.testing.assert_close(logits_behind(model, handle.cache(), ids), model(ids).logits, rtol=0, atol=2e-5)
    handle.merge()
    handle.detach()
    after = model.state_dict()
    assert after.keys() == bits.keys() and all(torch.equal(after[name], value) for name, value in bits.items())


def test_a_fused_projection_is_not_merged() -> None:
    model = tiny_model("phi3")
    config = MatryoshkaConfig(num_layers=2, kv_heads=2, head_dim=8, interval=2, ranks={"0.5": RAGGED})
    with MatryoshkaHandle(model, codec_for(turned(moments_of(model)), RAGGED), config) as handle:
        with pytest.raises(ValueError, match="in one projection"):
            handle.merge()


def test_both_members_share_a_cache() -> None:
    model, ids = tiny_model(), some_ids(2, 60)
    codec = codec_for(turned(moments_of(model)), RAGGED)
    for order in (("selector", "codec"), ("codec", "selector")):
        parts: dict[str, Any] = {"selector": {"selector": KeyNorm(), "policy": CachePolicy(budget=12, chunk=16)},
                                 "codec": {"codec": codec}}  # fmt: skip
        first, second = (attach_cache(model, **parts[name]) for name in order)
        greedy(model, ids, 4)
        cache = first.host.last
        assert first.host is second.host and cache.units() == [15, 15]
        assert cache.memory_bytes() == 2 * 15 * 4 * ((2 + 8 + 4 + 6 + 8 + 8 + 2 + 4) + 2 * 2)  # and two scores a layer
        with pytest.raises(ValueError, match="use original"):
            first.use(positions="compact")
        first.detach()
        greedy(model, ids, 4)
        assert cache is not second.host.last
        expected = [63, 63] if order[0] == "selector" else [15, 15]
        assert second.host.last.units() == expected
        second.detach()
        assert "generate" not in vars(model)


# What is learned.


def test_matrices_stay_orthogonal_at_any_size_and_under_autocast() -> None:
    moments = moments_of(tiny_model())
    for size in (0.1, 1.0, 10.0):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
                bases = turned(moments, size)()
            assert bases.dtype == torch.float32
            off = bases.transpose(-1, -2) @ bases - torch.eye(8)
            assert float(off.abs().max()) <= 5e-6


def test_at_the_start_they_are_pca_bit_for_bit() -> None:
    model, ids = tiny_model(), some_ids(1, 30)
    moments = moments_of(model)
    start = MatryoshkaProjections(moments)
    assert torch.equal(start().detach()[:, 0], moments.keys) and torch.equal(start().detach()[:, 1], moments.values)
    got = []
    for codec in (codec_for(start, RAGGED), ProjectionCodec(moments.keys, moments.values, moments.means, RAGGED)):
        with attach_cache(model, codec=codec) as handle:
            got.append(logits_behind(model, handle.cache(), ids))
    assert torch.equal(*got)


def test_principal_directions_are_those_of_all_keys_and_values() -> None:
    model, ids = tiny_model(), some_ids(4, 40)
    sites = attention_sites(model)
    moments = principal_bases(model, sites, [{"input_ids": part} for part in ids.split(1)])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for layer, held in enumerate(cache.layers):
        for side, states in enumerate((held.keys, held.values)):
            flat = states.transpose(0, 1).flatten(1, 2).double()
            variance = torch.linalg.eigvalsh(torch.stack([torch.cov(head.T, correction=0) for head in flat])).flip(-1)
            torch.testing.assert_close(moments.spectra[layer, side].double(), variance, rtol=1e-4, atol=1e-6)
            basis = (moments.keys, moments.values)[side][layer].double()
            along = ((flat - flat.mean(1, keepdim=True)) @ basis).var(1, correction=0)
            torch.testing.assert_close(along, variance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.means[layer], held.values.transpose(0, 1).flatten(1, 2).mean(1))


def test_every_unit_draws_every_rank_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_masks((2, 2, 2, 16), 2, generator).sum(-1) for _ in range(10_000)]).long()
    for rank in range(2, 17, 2):
        share = (draws == rank).float().mean(0)
        assert float((share - 1 / 8).abs().max()) < 0.02
    keys, values = draws[:, :, 0].flatten(1).float(), draws[:, :, 1].flatten(1).float()
    correlation = torch.corrcoef(torch.cat([keys.T, values.T]))
    assert float((correlation - torch.eye(8)).abs().max()) < 0.05


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_task(tiny_recipe("matryoshka_kv", save_tiny(tmp_path_factory.mktemp("tiny"))))


def test_at_full_rank_the_divergence_is_zero(task: Any) -> None:
    batch = next(iter(task.train_dataloader()))
    loss, kl, ce = (one.detach() for one in task.losses(batch, task.learned, torch.ones(task.shape)))
    assert abs(float(kl)) < 1e-5 and float(loss) == pytest.approx(0.75 * float(ce), abs=1e-5)
    masks = draw_masks(task.shape, 2, torch.Generator().manual_seed(0))
    loss, kl, ce = (one.detach() for one in task.losses(batch, task.learned, masks))
    assert float(kl) > 1e-3 and float(loss) == pytest.approx(0.25 * float(kl) + 0.75 * float(ce))


def test_only_projections_have_gradients(task: Any) -> None:
    batch = next(iter(task.train_dataloader()))
    task.training_step(batch, 0).backward()
    assert float(task.learned.skew.grad.abs().sum()) > 0 and float(task.learned.means.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in task.backbone.parameters())
    assert all(group["weight_decay"] == 0 for group in task.configure_optimizers()["optimizer"].param_groups)
    assert task.backbone.config._attn_implementation == "sdpa"
    task.learned.zero_grad()


def test_the_teacher_is_the_same_model(task: Any) -> None:
    batch, calls = next(iter(task.train_dataloader())), []
    hook = task.backbone.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    task.losses(batch, task.learned, torch.ones(task.shape))
    hook.remove()
    assert calls == [False, True]
    held = {id(value) for part in (task.backbone, task.learned) for value in (*part.parameters(), *part.buffers())}
    assert held == {id(value) for value in (*task.parameters(), *task.buffers())}


def test_a_budget_that_is_not_there_is_told_from_those_that_are() -> None:
    config = MatryoshkaConfig(num_layers=1, kv_heads=2, head_dim=8, interval=2, ranks={"0.5": [[[4, 4], [4, 4]]]})
    assert config.table(0.5) == (((4, 4), (4, 4)),)
    assert config.table("full") == config.table(1.0) == (((8, 8), (8, 8)),)
    with pytest.raises(ValueError, match="no ranks for the budget 0.3: it has 0.5 and full"):
        config.table(0.3)
    with pytest.raises(ValueError, match="give 1 to 8 for the keys and the values of 2 heads"):
        codec_for(turned(moments_of(tiny_model())), (((9, 4), (4, 4)),) * 2)
