"""The base task, its data order, its checkpoints and its folder, on a backbone of a few numbers."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.stepped import StepOrder, SteppedBatches, stepped_loader
from trainers import recipes, run_folder
from trainers.adapters import made_by
from trainers.base import FrozenBackboneTask, NonFiniteLoss, state_hash
from trainers.callbacks import AtomicCheckpointIO, Interrupted, read_checkpoint
from trainers.run_folder import RunFolder, atomic_write
from trainers.settings import ConfigError
from trainers.training import restore, train

SAMPLES = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))


class Tiny(FrozenBackboneTask):
    """Learns to undo a frozen, dropping-out, statistics-keeping layer, from noisy inputs."""

    def __init__(self, recipe, poison: int | None = None, stop: int | None = None) -> None:
        torch.manual_seed(recipe.seed)
        backbone = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 6))
        learned = nn.ModuleDict({"block": nn.Linear(6, 6), "gain": nn.Linear(1, 1, bias=False)})
        super().__init__(backbone.bfloat16(), learned.bfloat16(), recipe, copied={"block": "3"})
        self.poison, self.stop, self.seen = poison, stop, []

    def train_dataloader(self):
        return self.stepped_loader(lambda indices: (indices, SAMPLES[indices]), len(SAMPLES), 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        indices, inputs = batch
        self.seen.append((self.global_step, batch_idx, indices.tolist()))
        noisy = inputs + 0.1 * torch.randn_like(inputs)
        with torch.no_grad():
            hidden = self.backbone(noisy.bfloat16()).float()
        loss = (self.learned["gain"](self.learned["block"](hidden)[..., None])[..., 0] - inputs).square().mean()
        self.note(hidden=hidden.abs().mean())
        if self.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss * float("nan") if self.global_step == self.poison else loss


def recipe(**changes: str):
    every = {"trainer__save_every": "3", "trainer__log_every": "2", "trainer__sample_every": "0", "trainer__ema": "0.9"}
    keys = {"trainer__max_steps": "8", "trainer__accelerator": "cpu"} | every | changes
    return recipes.compose_recipe("ilf_pixart", {key.replace("__", "."): value for key, value in keys.items()})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def learned_bits(task: Tiny) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_training_moves_all_that_learns_and_no_bit_of_the_backbone(folder: RunFolder) -> None:
    task = Tiny(recipe())
    frozen, before = state_hash(task.backbone), learned_bits(task)
    train(task, folder)
    assert state_hash(task.backbone) == frozen
    assert all(not torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert not task.backbone.training and task.learned.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in task.backbone.parameters())


def test_what_learns_is_float32_under_a_bfloat16_backbone() -> None:
    task = Tiny(recipe())
    assert {value.dtype for value in task.learned.parameters()} == {torch.float32}
    assert {value.dtype for value in task.backbone.parameters()} == {torch.bfloat16}


def test_a_checkpoint_holds_the_learned_part_and_little_else(folder: RunFolder) -> None:
    task = Tiny(recipe())
    train(task, folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_0000006.ckpt", "step_0000008.ckpt"]
    content = read_checkpoint(folder.latest_checkpoint())
    assert {name.split(".")[0] for name in content["state_dict"]} == {"learned", "averaged"}
    assert len(content["optimizer_states"][0]["state"]) == len(list(task.learned.parameters()))

    class Wide(Tiny):
        def __init__(self, recipe) -> None:
            super().__init__(recipe)
            self.learned["block"] = nn.Linear(300, 300)
            self._average = []

    wide = Wide(recipe(trainer__ema="0"))
    wide.trainer = None
    path = folder.path / "wide.ckpt"
    state = {"state_dict": wide.state_dict(), "optimizer_states": [{"a": wide.state_dict(), "b": wide.state_dict()}]}
    AtomicCheckpointIO().save_checkpoint(state, path)
    learned_bytes = sum(value.numel() * 4 for value in wide.learned.parameters())
    assert path.stat().st_size < 4 * learned_bytes


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_resuming_equals_never_stopping_bit_for_bit(tmp_path: Path, accumulate: str) -> None:
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    settings = {"trainer__accumulate_grad_batches": accumulate, "optimizer__warmup_steps": "2"}
    never = Tiny(recipe(**settings))
    train(never, whole)
    first = Tiny(recipe(**settings), stop=4)
    with pytest.raises(Interrupted):
        train(first, parts)
    assert parts.latest_checkpoint().name == "step_0000005.ckpt"
    torch.randn(1234)  # what else happened in the process is of no matter
    second = Tiny(recipe(**settings))
    train(second, parts)
    assert first.seen + second.seen == never.seen
    assert_equal(second.state_dict(), never.state_dict())
    theirs, ours = read_checkpoint(whole.latest_checkpoint()), read_checkpoint(parts.latest_checkpoint())
    assert_equal(theirs["optimizer_states"][0]["state"][0], ours["optimizer_states"][0]["state"][0])
    steps = [row["step"] for row in csv.DictReader(parts.metrics.open())]
    assert steps == ["2", "4", "6", "8"]
    assert {"loss", "lr", "step_s", "images_per_s", "memory_mib", "hidden"} <= next(
        csv.DictReader(whole.metrics.open())
    ).keys()


def test_a_longer_budget_continues_a_finished_run(folder: RunFolder) -> None:
    settings = {"optimizer__schedule": "constant"}
    train(Tiny(recipe(**settings)), folder)
    longer = Tiny(recipe(**settings, trainer__max_steps="10"))
    train(longer, folder)
    assert [step for step, _, _ in longer.seen] == [8, 9]
    at_once = Tiny(recipe(**settings, trainer__max_steps="10"))
    train(at_once, RunFolder(folder.path / "other"))
    assert_equal(longer.state_dict(), at_once.state_dict())


def test_the_first_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(folder: RunFolder) -> None:
    with pytest.raises(NonFiniteLoss, match=r"step 4, batch 4 \(samples \d+, \d+, \d+, \d+\)"):
        train(Tiny(recipe(), poison=4), folder)
    restored = Tiny(recipe())
    restore(restored, folder.latest_checkpoint())
    assert folder.latest_checkpoint().name == "step_0000003.ckpt" and restored.steps_done == 3
    assert all(torch.isfinite(value).all() for value in restored.state_dict().values())


def test_broken_weights_never_replace_a_good_checkpoint(folder: RunFolder) -> None:
    class Breaks(Tiny):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if self.global_step == 5:
                self.learned["block"].weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(NonFiniteLoss, match="weights are not finite"):
        train(Breaks(recipe()), folder)
    assert folder.latest_checkpoint().name == "step_0000003.ckpt"


def test_the_average_follows_the_weights_and_is_what_is_exported(folder: RunFolder) -> None:
    task = Tiny(recipe(trainer__max_steps="1"))
    start = task.learned["block"].weight.clone()
    train(task, folder)
    decay = min(0.9, 2 / 11)
    want = decay * start + (1 - decay) * task.learned["block"].weight
    assert task.exported is task.averaged
    torch.testing.assert_close(task.averaged["block"].weight, want)
    assert Tiny(recipe(trainer__ema="0")).exported["block"].weight.requires_grad


def test_a_checkpoint_of_another_module_is_refused_by_name(folder: RunFolder) -> None:
    task = Tiny(recipe())
    state = {"global_step": 1, "state_dict": task.state_dict()}
    with pytest.raises(ValueError, match="the checkpoint lacks averaged"):
        task.on_load_checkpoint(state | {"state_dict": {k: v for k, v in state["state_dict"].items() if "avg" in k}})
    with pytest.raises(ValueError, match="the checkpoint has averaged"):
        Tiny(recipe(trainer__ema="0")).on_load_checkpoint(state)
    state["state_dict"]["learned.block.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"learned.block.bias is \(7,\) in the checkpoint but \(6,\)"):
        task.on_load_checkpoint(state)


def test_a_pickle_is_never_executed(folder: RunFolder) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder.path / "executed"),)

    torch.save({"state_dict": Bomb()}, folder.path / "bomb.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        read_checkpoint(folder.path / "bomb.ckpt")
    assert not (folder.path / "executed").exists()


def test_the_optimizer_refuses_what_is_not_learned() -> None:
    task = Tiny(recipe())
    task.parameter_groups = lambda: [{"params": list(task.backbone.parameters())}]
    with pytest.raises(ValueError, match="only that part is trained"):
        task.configure_optimizers()
    with pytest.raises(ValueError, match="holds the backbone's own parameter"):
        FrozenBackboneTask(task.backbone, nn.ModuleList([task.backbone]), recipe())


def test_the_table_names_trained_copied_and_frozen() -> None:
    rows = {row["part"]: row for row in Tiny(recipe()).parameter_table()}
    assert rows["learned.block"]["copied_from"] == "3" and rows["learned.block"]["parameters"] == 42
    assert rows["learned.gain"]["state"] == "trained"
    assert rows["backbone (Sequential)"]["state"] == "frozen"


def test_every_epoch_has_every_sample_once_and_ranks_share_it() -> None:
    order = StepOrder(length=12, batch_size=3, seed=1)
    epochs = [torch.cat([order.indices(4 * epoch + i) for i in range(4)]) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    halves = [StepOrder(length=12, batch_size=3, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.indices(1) for half in halves]), torch.cat([order.indices(2), order.indices(3)]))


def test_a_batch_may_be_longer_than_the_data() -> None:
    assert StepOrder(length=2, batch_size=5, seed=0).indices(7).shape == (5,)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_that_of_the_step_whatever_the_workers(workers: int) -> None:
    order = StepOrder(length=10, batch_size=3, seed=4)
    state = torch.get_rng_state()
    loader = iter(stepped_loader(lambda indices: indices, order, start=5, num_workers=workers))
    got = [next(loader).tolist() for _ in range(4)]
    assert got == [order.indices(number).tolist() for number in range(5, 9)]
    assert torch.equal(state, torch.get_rng_state())
    assert next(iter(SteppedBatches(lambda indices: indices, order, 9))).tolist() == order.indices(9).tolist()


def test_a_killed_save_leaves_the_older_checkpoint_loadable(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        from trainers.callbacks import AtomicCheckpointIO
        path = Path(sys.argv[1])
        AtomicCheckpointIO().save_checkpoint({"step": 1, "x": torch.ones(1000)}, path)
        class Kills:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)
        AtomicCheckpointIO().save_checkpoint({"x": torch.ones(1000), "step": 2, "kill": Kills()}, path)
    """)
    path = tmp_path / "checkpoints" / "step_0000001.ckpt"
    environment = os.environ | {"PYTHONPATH": str(Path(run_folder.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(path.parent.glob(".*.tmp"))) == 1
    folder = RunFolder(tmp_path)
    assert read_checkpoint(folder.latest_checkpoint())["step"] == 1
    folder.begin(recipe(), [])
    assert not list(path.parent.glob(".*.tmp"))


def test_an_adapter_says_what_made_it_wherever_the_run_lay(folder: RunFolder) -> None:
    task, resumed = Tiny(recipe(run="a")), Tiny(recipe(run="b").model_copy(update={"resume": "elsewhere"}))
    train(task, folder)
    assert made_by(task)["steps"] == 8 and made_by(task)["seed"] == 0 and made_by(task)["recipe"] == "ilf_pixart"
    assert made_by(task)["recipe_sha256"] == made_by(resumed)["recipe_sha256"]
    assert made_by(task)["recipe_sha256"] != made_by(Tiny(recipe(seed="1")))["recipe_sha256"]


def test_atomic_write_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "old")

    def fails(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fails)
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_runs_take_the_first_free_number_and_never_anothers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    settings = recipe(output_dir=str(tmp_path))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(RunFolder.for_recipe(settings).path)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(path.name for path in found) == [f"{number:03d}" for number in range(8)]
    named = recipe(output_dir=str(tmp_path), run="mine")
    mine = RunFolder.for_recipe(named)
    assert mine.path == tmp_path / "ilf_pixart" / "mine"
    (mine.path / ".lock").touch()
    assert RunFolder.for_recipe(named) == mine, (
        "a run that was killed before its recipe was stored can only begin again"
    )
    mine.begin(named, [])
    with pytest.raises(ConfigError, match="is another run"):
        RunFolder.for_recipe(named)


def test_a_slurm_job_names_its_run_and_a_requeued_one_finds_it_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    settings = recipe(output_dir=str(tmp_path))
    first = RunFolder.for_recipe(settings).path
    assert first.name == "4711"
    (first / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is another run"):
        RunFolder.for_recipe(settings)
    assert RunFolder.for_recipe(settings, rank=1).path == first
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert RunFolder.for_recipe(settings).path == first


def test_a_folder_says_where_it_comes_from(folder: RunFolder) -> None:
    import json

    folder.begin(recipe(), ["fit", "seed=1"])
    folder.begin(recipe(), ["fit", "resume=x"])
    stored = json.loads(folder.provenance.read_text())
    assert stored["argv"] == ["fit", "seed=1"] and stored["resumed"][0]["argv"] == ["fit", "resume=x"]
    assert stored["versions"]["torch"] == torch.__version__ and stored["devices"]["cores"] >= 1
    assert recipes.compose_resumed(str(folder.path), None, {}).trainer.max_steps == 8
    folder.discard_if_empty()
    assert not folder.path.exists()


def test_a_run_that_could_not_begin_leaves_other_runs_and_no_empty_folder(tmp_path: Path) -> None:
    settings = recipe(output_dir=str(tmp_path))
    only = RunFolder.for_recipe(settings)
    only.discard_if_empty()
    assert not any(tmp_path.iterdir())
    kept, refused = RunFolder.for_recipe(settings), RunFolder.for_recipe(settings)
    refused.discard_if_empty()
    assert kept.path.is_dir() and not refused.path.exists()
