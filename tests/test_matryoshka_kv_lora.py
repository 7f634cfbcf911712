"""LoRA beside the projections: trained along, exported with them, put into a model and taken out again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.load import load_adapter, read_tensors
from checkpoints.manifest import read_manifest
from modules.contracts import TokenSelector
from modules.kv_host import CachePolicy, attach_cache
from modules.kv_host.layer import HeldUnits, NewTokens
from modules.language_models import load_model
from modules.lora import lora_off
from modules.matryoshka_kv import attach, draw_masks, rank_masks
from tests.tiny_kv import save_tiny, tiny_recipe
from tests.tiny_kv_models import logits_behind, some_ids
from trainers import fit
from trainers.base import state_hash
from trainers.run_folder import RunFolder
from trainers.training import build_task, restore, train

TARGETS = "[q_proj,v_proj,o_proj,down_proj]"
LORA = {"lora.rank": "2", "lora.targets": TARGETS, "lora.dropout": "0", "lora.lr_scale": "1", "trainer.max_steps": "4"}
LORA |= {"optimizer.lr": "0.03"}
IDS = some_ids(2, 40, seed=5) % 32 + 2


def keys(changes: dict[str, str]) -> dict[str, str]:
    return {name.replace(".", "__"): value for name, value in changes.items()}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def tiny_task(backbone: str, **changes: str) -> Any:
    return build_task(tiny_recipe("matryoshka_kv", backbone, **{**keys(LORA), **changes}))


@pytest.fixture(scope="module")
def trained(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A task after its training, and the run's folder with the adapter."""
    task, run = tiny_task(backbone), RunFolder(tmp_path_factory.mktemp("run"))
    train(task, run)
    task.export_adapter(run.adapter)
    return task, run.path


def state_of_parts(model: Any) -> dict[str, Any]:
    """Kinds of all parts, their attributes, and which parameters learn."""
    parts: dict[str, Any] = {name: (type(part), sorted(vars(part))) for name, part in model.named_modules()}
    return parts | {name: value.requires_grad for name, value in model.named_parameters()}


def test_lora_and_projections_learn_and_the_backbone_keeps_every_bit(backbone: str, trained: Any) -> None:
    task, _ = trained
    fresh = tiny_task(backbone).learned.state_dict()
    moved = {name for name, value in task.learned.state_dict().items() if not torch.equal(value, fresh[name])}
    assert moved == set(fresh) - {"start", "start_means", "spectra"} and any(name.startswith("lora.") for name in moved)
    original = load_model(backbone)[0].state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in task.backbone.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in original.items())
    frozen = task.parameter_table()[-1]
    assert frozen["state"] == "frozen" and frozen["parameters"] == sum(
        p.numel() for p in load_model(backbone)[0].parameters()
    )


def test_the_adapter_brings_lora_and_takes_it_away_bit_for_bit(backbone: str, trained: Any) -> None:
    task, folder = trained
    model, _ = load_model(backbone)
    model.lm_head.requires_grad_(True)  # somebody trains it: it must stay so
    bits, parts = state_hash(model), state_of_parts(model)
    with torch.no_grad():
        want = model(IDS).logits
    ranks = torch.tensor(task.config().table("0.5"))
    with torch.no_grad(), task.evaluating(), task.projected(task.learned, rank_masks(ranks, 8)):
        graph = task.backbone(IDS).logits
    with load_adapter(model, folder / "adapter") as handle:
        torch.testing.assert_close(logits_behind(model, handle.cache(), IDS), graph, rtol=5e-5, atol=5e-5)
        handle.use_budget("full")
        whole = logits_behind(model, handle.cache(), IDS)
        with torch.no_grad(), task.evaluating():
            torch.testing.assert_close(whole, task.backbone(IDS).logits, rtol=5e-5, atol=5e-5)
        assert float((whole - want).abs().max()) > 1e-3  # full rank is the model with LoRA
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        assert learning == {"lm_head.weight"} or learning == {"model.embed_tokens.weight"}
    assert state_hash(model) == bits and state_of_parts(model) == parts
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want)


def test_merging_folds_what_lora_adds(backbone: str, trained: Any) -> None:
    model, _ = load_model(backbone)
    with load_adapter(model, trained[1] / "adapter") as handle:
        want = logits_behind(model, handle.cache(), IDS)
        handle.merge()
        torch.testing.assert_close(logits_behind(model, handle.cache(), IDS), want, rtol=5e-5, atol=5e-5)
        handle.unmerge()
        assert torch.equal(logits_behind(model, handle.cache(), IDS), want)


class ByFeatures(TokenSelector):
    """Keeps what its layer's projections say most of; remembers the features that it saw."""

    needs_features = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        assert new.features is not None
        self.seen.append(new.features)
        return new.keys.norm(dim=-1)


def test_a_selector_reads_the_projections_that_are_at_work(backbone: str, trained: Any) -> None:
    """Whichever comes first, and whichever goes first."""
    seen: dict[str, list[Tensor]] = {}
    for order in ("selector first", "lora first", "alone"):
        model, _ = load_model(backbone)
        selector = ByFeatures()
        attach = {
            "lora": partial(load_adapter, model, trained[1] / "adapter"),
            "selector": partial(attach_cache, model, selector=selector, policy=CachePolicy(budget=12)),
        }
        if order == "alone":
            last = attach["selector"]()
        else:
            names = ["selector", "lora"] if order == "selector first" else ["lora", "selector"]
            handles = {name: attach[name]() for name in names}
            logits_behind(model, handles["selector"].cache(), IDS)
            seen[f"{order}, both"] = selector.seen[:]
            handles["lora"].detach()
            last = handles["selector"]
        selector.seen.clear()
        logits_behind(model, last.cache(), IDS)
        seen[order] = selector.seen[:]
        last.detach()
        assert "generate" not in vars(model) and not hasattr(model, "peft_config")
    assert all(torch.equal(a, b) for a, b in zip(seen["selector first, both"], seen["lora first, both"], strict=True))
    assert not torch.equal(seen["lora first, both"][0], seen["alone"][0])
    for order in ("selector first", "lora first"):
        assert all(torch.equal(a, b) for a, b in zip(seen[order], seen["alone"], strict=True))


def test_what_does_not_fit_is_refused_and_leaves_the_model(backbone: str, trained: Any, tmp_path: Path) -> None:
    model, _ = load_model(backbone)
    parts = state_of_parts(model)
    manifest, tensors = read_manifest(trained[1] / "adapter"), read_tensors(trained[1] / "adapter")
    missing = {name: value for name, value in tensors.items() if "down_proj" not in name}
    with pytest.raises(ValueError, match="differ in lora.model.layers.0.mlp.down_proj.A"):
        attach(model, manifest, missing)
    assert state_of_parts(model) == parts
    with load_adapter(model, trained[1] / "adapter"), pytest.raises(ValueError, match="."):
        load_adapter(model, trained[1] / "adapter")
    assert state_of_parts(model) == parts


def test_a_layer_that_is_not_there_is_named(backbone: str) -> None:
    with pytest.raises(ValueError, match="names qkv_proj, and the backbone has no linear layer of that name: it has"):
        tiny_task(backbone, lora__targets="[q_proj,qkv_proj]")


def test_the_teacher_is_the_model_as_it_was(backbone: str) -> None:
    task = tiny_task(backbone)
    batch = next(iter(task.train_dataloader()))
    full = torch.ones(task.shape)
    assert abs(float(task.losses(batch, task.learned, full)[1].detach())) < 1e-5
    with torch.no_grad():
        for part in task.lora_parts().values():
            part[1].weight.normal_(std=0.3)
    kl = float(task.losses(batch, task.learned, full)[1].detach())
    with torch.no_grad():
        own = task._logits(batch[0], batch[1][:, 1:] != -100).log_softmax(-1)
        with lora_off(task.backbone):
            theirs = task._logits(batch[0], batch[1][:, 1:] != -100).log_softmax(-1)
    want = float((theirs.exp() * (theirs - own)).sum(-1).mean())
    assert want > 1e-3 and kl == pytest.approx(want, rel=1e-3)
    # Ranks are judged by what they take from the model with LoRA.
    assert abs(task._divergence()(torch.full(task.shape[:3], 8))) < 1e-5


def test_lora_alone_comes_first(backbone: str, tmp_path: Path) -> None:
    task = tiny_task(backbone, lora__alone="2", trainer__save_every="1")
    step, seen, up = task.training_step, [], "lora.model.layers.0.mlp.down_proj.B"

    def watched(batch: Any, batch_idx: int) -> Tensor:
        seen.append((task.learned.skew.detach().clone(), task.lora_tensors()[up].clone()))
        return step(batch, batch_idx)

    task.training_step = watched
    train(task, RunFolder(tmp_path))
    skews, ups = zip(*seen, strict=True)
    assert not skews[1].any() and not skews[2].any() and skews[3].any()
    assert ups[1].any() and not torch.equal(ups[2], ups[3])


def test_a_resumed_run_ends_as_one_never_stopped(backbone: str, trained: Any, tmp_path: Path) -> None:
    run = RunFolder(trained[1])
    middle = sorted(run.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[0]
    task = tiny_task(backbone)
    restore(task, middle)
    assert task.steps_done == 2
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    (folder.checkpoints / middle.name).write_bytes(middle.read_bytes())
    again = tiny_task(backbone)
    train(again, folder)
    theirs = trained[0].learned.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.learned.state_dict().items())


def test_lora_learns_from_narrow_caches(backbone: str) -> None:
    task = tiny_task(backbone)
    batch = next(iter(task.train_dataloader()))
    with torch.no_grad():  # at its start the gradient of A is zero
        for part in task.lora_parts().values():
            part[1].weight.normal_(std=0.1)
    masks = draw_masks(task.shape, 2, torch.Generator().manual_seed(0))
    gradients = []
    for one in (masks, torch.ones(task.shape)):
        task.learned.zero_grad()
        task.losses(batch, task.learned, one)[0].backward()
        gradients.append({name: value.grad.clone() for name, value in task.learned.lora.named_parameters()})
    assert all(float(value.abs().sum()) > 0 for value in gradients[0].values())
    assert any(not torch.allclose(value, gradients[1][name]) for name, value in gradients[0].items())
    assert all(p.grad is None for name, p in task.backbone.named_parameters() if "lora" not in name)


def test_the_report_tells_what_lora_does_by_itself(backbone: str, tmp_path: Path) -> None:
    text = str(Path(backbone).with_name("text"))
    settings = [f"{name}={value}" for name, value in LORA.items()]
    small = ["evaluation.inputs=2", "module.budgets=[0.5]"]
    argv = [
        f"recipe={Path(__file__).with_name('matryoshka_kv_tiny.yaml')}",
        f"backbone.name={backbone}",
        f"data.path={text}",
    ]
    assert fit.main([*argv, *settings, *small, f"output_dir={tmp_path}", "run=a"]) == 0
    folder = tmp_path / "matryoshka_kv_tiny" / "a"
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    own, full = rows["LoRA, full width"], rows["full cache"]
    assert own["work"]["cache_bytes"] == full["work"]["cache_bytes"]
    assert own["quality"]["perplexity"] != full["quality"]["perplexity"] and "the adapter's LoRA" in report["reference"]
    assert "LoRA, full width" in (folder / "adapter" / "README.md").read_text()
