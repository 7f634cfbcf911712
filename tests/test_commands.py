"""The commands as they are typed: what they answer, how they end, what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainers import export, fit, recipes, training
from trainers.base import FrozenBackboneTask

ROOT = Path(recipes.__file__).parents[1]
# Runs a command and fails it if it imported anything heavy.
RUN = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    heavy = {"torch", "lightning", "transformers", "diffusers", "numpy"} & set(sys.modules)
    assert not heavy, heavy
"""


def typed(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as typed in the folder `cwd`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_a_refused_command_tells_all_and_leaves_nothing(tmp_path: Path) -> None:
    done = typed("trainers.fit", "recipe=ilf_pixart", "trainer.max_stepz=3", "seed=x", "--prnt", "word", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["error"] * 4
    assert "trainer.max_steps" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_print_is_the_resolved_recipe_and_leaves_nothing(tmp_path: Path) -> None:
    done = typed("trainers.fit", "--print", "recipe=ilf_pixart_alpha_512", "seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert recipes.compose_recipe(str(tmp_path / "printed.yaml")) == recipes.compose_recipe(
        "ilf_pixart_alpha_512", {"seed": "3"}
    )


@pytest.mark.parametrize("module", ["trainers.fit", "trainers.export"])
def test_help_needs_nothing_heavy(module: str, tmp_path: Path) -> None:
    done = typed(module, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"python -m {module}" in done.stdout


def test_help_of_a_recipe_has_its_methods_keys_and_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["--help", "recipe=ilf_pixart_alpha_512"]) == 0
    told = capsys.readouterr().out
    assert "module.span_len = 12   [an integer > 0]" in told and "trainer.precision = 'bf16-mixed'" in told


def test_list_names_every_recipe_with_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["--list"]) == 0
    told = capsys.readouterr().out
    for name, text in recipes.available().items():
        assert name in told and text.splitlines()[0] in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "recipe=NAME is missing"),
        (["recipe=ilf_pixrt"], "did you mean recipe=ilf_pixart?"),
        (["resume=nowhere"], "resume=nowhere holds no config.yaml"),
    ],
)
def test_refusals(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(words) == 2
    assert sentence in capsys.readouterr().err


class Fake(FrozenBackboneTask):
    """The smallest method: one number learns to be the data's mean."""

    loss_at: dict[int, object] = {}

    def __init__(self, recipe) -> None:
        torch.manual_seed(recipe.seed)
        super().__init__(nn.Linear(2, 2), nn.ParameterDict({"mean": nn.Parameter(torch.randn(2))}), recipe)

    def train_dataloader(self):
        return self.stepped_loader(lambda indices: indices.float()[:, None].expand(-1, 2), 8, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        extra = self.loss_at.get(self.global_step, 0.0)
        return (batch - self.learned["mean"]).square().mean() + (extra() if callable(extra) else extra)

    def export_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mean").write_text(str(self.exported["mean"].tolist()))

    def sample_images(self, count: int) -> tuple[Tensor, Tensor]:
        assert not self.learned.training
        return torch.rand(count, 3, 4, 4), torch.rand(count, 3, 4, 4)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(training, "build_task", Fake)
    monkeypatch.setattr(Fake, "loss_at", {})
    return tmp_path / "outputs" / "ilf_pixart"


SHORT = [
    "recipe=ilf_pixart",
    "evaluate=false",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.save_every=2",
]


def test_fit_leaves_a_whole_run(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main([*SHORT, "trainer.sample_every=3", "trainer.log_every=2"]) == 0
    run = fake / "000"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "provenance.json", "metrics.csv", "checkpoints", "adapter", "samples", "summary.json"
    }  # fmt: skip
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_0000003.png", "step_0000006.png"]
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    told = capsys.readouterr().out
    assert "step 6/6" in told and str(run.relative_to(Path.cwd())) in told
    assert fit.main(SHORT) == 0 and (fake / "001" / "adapter").is_dir()


def test_a_loss_that_is_not_finite_ends_with_three_and_a_sentence(fake: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Fake, "loss_at", {3: float("inf")})
    assert fit.main(SHORT) == 3
    assert "step 3, batch 3" in (told := capsys.readouterr().err) and "step_0000002.ckpt is kept" in told


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_after_the_step_and_the_run_can_be_resumed(signum, fake: Path, capsys, monkeypatch) -> None:
    def terminate() -> float:
        os.kill(os.getpid(), signum)
        return 0.0

    monkeypatch.setattr(Fake, "loss_at", {2: terminate})
    assert fit.main([*SHORT, "run=mine"]) == 128 + signum
    assert f"stopped by {signum.name} after step 3" in capsys.readouterr().err
    monkeypatch.setattr(Fake, "loss_at", {})
    assert fit.main(["resume=outputs/ilf_pixart/mine"]) == 0
    assert fit.main([*SHORT, "run=whole"]) == 0
    assert (fake / "mine/adapter/mean").read_text() == (fake / "whole/adapter/mean").read_text()


def test_a_signal_after_the_last_step_ends_at_once_and_export_is_made_up_for(fake: Path, capsys, monkeypatch) -> None:
    export_adapter = Fake.export_adapter

    def interrupted(self, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("went on")

    monkeypatch.setattr(Fake, "export_adapter", interrupted)
    assert fit.main([*SHORT, "run=mine"]) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 while no step was running; " in (told := capsys.readouterr().err)
    assert "step_0000006.ckpt is kept" in told and not (fake / "mine/adapter").exists()
    monkeypatch.setattr(Fake, "export_adapter", export_adapter)
    assert fit.main(["resume=outputs/ilf_pixart/mine"]) == 0 and (fake / "mine/adapter/mean").is_file()


def test_a_name_that_is_taken_is_refused_and_kept(fake: Path, capsys) -> None:
    assert fit.main([*SHORT, "run=mine"]) == 0
    before = (fake / "mine/metrics.csv").read_bytes()
    assert fit.main([*SHORT, "run=mine", "seed=1"]) == 2
    assert "continue it with resume=outputs/ilf_pixart/mine" in capsys.readouterr().err
    assert (fake / "mine/metrics.csv").read_bytes() == before


def test_a_backbone_that_cannot_be_built_is_one_sentence_and_no_folder(fake: Path, capsys, monkeypatch) -> None:
    def missing(recipe):
        raise OSError("no such\n backbone")

    monkeypatch.setattr(training, "build_task", missing)
    assert fit.main(SHORT) == 1
    assert capsys.readouterr().err == "error: no such backbone; there is no checkpoint yet\n"
    assert not fake.exists()


def test_dry_run_loads_what_it_exported_and_leaves_nothing(fake: Path, monkeypatch) -> None:
    class Handle:
        def detach(self) -> None:
            seen.append("detached")

    seen: list[object] = []
    monkeypatch.setattr(training, "load_adapter", lambda target, folder: seen.append(folder.name) or Handle())
    assert fit.main([*SHORT, "--dry-run"]) == 0
    assert seen == ["adapter", "detached"]
    assert not fake.exists()


def test_export_writes_the_newest_checkpoints_adapter_again(fake: Path, capsys) -> None:
    assert fit.main(SHORT) == 0
    assert export.main([f"run={fake}/000", "output=again"]) == 0
    assert Path("again/mean").read_text() == (fake / "000/adapter/mean").read_text()
    assert "after step 6" in capsys.readouterr().out
    (fake / "000/checkpoints/step_0000004.ckpt").write_bytes(b"nothing")
    assert export.main([f"run={fake}/000", f"checkpoint={fake}/000/checkpoints/step_0000004.ckpt"]) == 1
    assert export.main([f"run={fake}/9"]) == 2
