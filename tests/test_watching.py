"""What a run tells while it trains and at its end: lines, bar, throughput, profile, summary."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_base import Tiny, recipe
from tests.test_commands import SHORT, Fake
from trainers import fit, recipes, training
from trainers.callbacks import Interrupted, Metrics, callback_of, callbacks_for, metrics
from trainers.run_folder import RunFolder
from trainers.summary import Stopwatch
from trainers.training import train

ROOT = Path(recipes.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(training, "build_task", Fake)
    monkeypatch.setattr(Fake, "loss_at", {})
    return tmp_path / "outputs" / "ilf_pixart"


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open() as file:
        return list(csv.DictReader(file))


def trace(folder: RunFolder) -> dict[str, Any]:
    return json.loads(gzip.decompress((folder.profile / "trace_rank0.json.gz").read_bytes()))


def updates_in(content: dict[str, Any]) -> int:
    """How many optimizer steps a trace holds."""
    names = [event.get("name", "") for event in content["traceEvents"] if event.get("ph") == "X"]
    return sum(name.startswith("Optimizer.step#") for name in names)


# Lines, bar, figures.


def test_lines_say_start_progress_files_and_end(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main([*SHORT, "run=mine", "trainer.log_every=2", "trainer.sample_every=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    run = "outputs/ilf_pixart/mine"
    marks = [
        f"run folder {run}",
        "learned.mean",
        "training at step 0/6 on 1 x cpu, 32-true",
        "step 2/6  loss",
        f"wrote {run}/checkpoints/step_0000002.ckpt (",
        f"wrote {run}/samples/step_0000003.png (",
        "step 6/6  loss",
        f"wrote {run}/checkpoints/step_0000006.ckpt (",
        "time    0:00:",
        "speed   ",
        "sizes   checkpoint ",
        f"folder  {run}: adapter/, checkpoints/, config.yaml, metrics.csv,",
    ]
    places = [next(i for i, line in enumerate(lines) if mark in line) for mark in marks]
    assert places == sorted(places)
    assert all("\x1b" not in line for line in lines)
    assert fit.main([f"resume={run}", "trainer.max_steps=7"]) == 0
    assert "resuming at step 6/7" in capsys.readouterr().out


@pytest.mark.slow
def test_lines_arrive_while_training_goes_on(fake: Path) -> None:
    """A pipe gets each line when it is made, not when a buffer is full."""
    code = (
        "from tests.test_commands import Fake\n"
        "from trainers import fit, training\n"
        "training.build_task = Fake\n"
        "Fake.loss_at = {3: lambda: float(input())}\n"
        f"fit.main({[*SHORT, 'trainer.log_every=1']!r})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes) as child:
        for line in child.stdout:
            if line.startswith("step 3/6"):  # step 4 waits for us
                break
        else:
            pytest.fail("the line of step 3 never came")
        out, _ = child.communicate("0\n", timeout=100)
        assert "step 6/6" in out and child.returncode == 0


def test_a_terminal_has_a_bar_with_the_figures_and_no_lines(folder: RunFolder) -> None:
    screen = io.StringIO()
    train(Tiny(recipe()), folder, Console(file=screen, force_terminal=True, width=120))
    told = screen.getvalue()
    assert "8/8" in told and "images/s" in told and "ms/step" in told and "MiB" in told
    assert "wrote" not in told and "step 8/8" not in told


def test_throughput_is_in_the_unit_of_the_task(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    class Words(Tiny):
        unit, units_per_sample = "tokens", 512

    trainer = train(Words(recipe()), folder)
    assert "tokens/s" in capsys.readouterr().out
    for row in rows(folder):
        assert "images_per_s" not in row
        assert float(row["tokens_per_s"]) * float(row["step_s"]) == pytest.approx(4 * 512, rel=1e-4)
    totals = callback_of(trainer, Metrics).totals
    assert (totals.first_step, totals.last_step, totals.units) == (0, 8, 8 * 4 * 512)


@pytest.mark.parametrize("accumulate", ["1", "4"])
def test_the_loss_is_the_mean_over_batches_however_many_make_an_update(folder: RunFolder, accumulate: str) -> None:
    class Constant(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + 3.0

    train(Constant(recipe(trainer__accumulate_grad_batches=accumulate)), folder)
    assert [float(row["loss"]) for row in rows(folder)] == [3.0] * 4


class Ops(TorchDispatchMode):
    """The tensor operations under it."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_between_two_lines_the_metrics_only_add(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value on the host would wait for the device."""
    seen: dict[int, list[str]] = {}
    original = Metrics.on_train_batch_end

    def watched(self, trainer, *arguments) -> None:
        with Ops(seen.setdefault(trainer.global_step, [])):
            original(self, trainer, *arguments)

    monkeypatch.setattr(Metrics, "on_train_batch_end", watched)
    train(Tiny(recipe(trainer__log_every="4")), folder)
    quiet = {name for step, names in seen.items() if step % 4 for name in names}
    assert quiet <= {"detach", "mul", "add"}
    assert "_local_scalar_dense" in seen[4]


# The profile.


def test_a_range_of_updates_is_traced_and_tabled(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    train(Tiny(recipe(trainer__profile="[3,5]", trainer__accumulate_grad_batches="2")), folder)
    told = capsys.readouterr().out
    assert f"profile of updates 3 to 5: {folder.profile}/trace_rank0.json.gz" in told
    assert updates_in(trace(folder)) == 3
    table = (folder.profile / "operations.txt").read_text().splitlines()
    assert table[0].endswith("were spent in operations on the cpu") and any("aten::addmm" in line for line in table)
    spent = [float(line.split()[0]) for line in table[2:]]
    assert spent == sorted(spent, reverse=True) and 0 < len(spent) <= 12
    assert sorted(path.name for path in folder.profile.iterdir()) == ["operations.txt", "trace_rank0.json.gz"]


@pytest.mark.parametrize(("count", "told"), [("2", "updates 6 to 7"), ("5", "updates 4 to 8"), ("9", "updates 1 to 8")])
def test_a_count_is_taken_after_the_warm_up_as_far_as_the_run_is_long(folder, capsys, count: str, told: str) -> None:
    train(Tiny(recipe(trainer__profile=count)), folder)
    assert f"profile of {told}" in capsys.readouterr().out
    first, last = map(int, told.split()[1::2])
    assert updates_in(trace(folder)) == last - first + 1


def test_a_resumed_run_profiles_what_is_left_of_the_range(folder: RunFolder, capsys) -> None:
    with pytest.raises(Interrupted):
        train(Tiny(recipe(trainer__profile="[3,7]"), stop=4), folder)
    assert not folder.profile.exists()
    train(Tiny(recipe(trainer__profile="[3,7]")), folder)
    assert "profile of updates 6 to 7" in capsys.readouterr().out
    assert updates_in(trace(folder)) == 2


def test_without_the_switch_there_is_no_profiler(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.callbacks.profile.profile", lambda **_: pytest.fail("a profiler was made"))
    train(Tiny(recipe()), folder)
    assert not folder.profile.exists()
    assert "Profile" not in {type(callback).__name__ for callback in callbacks_for(Tiny(recipe()), folder)}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[5,3]", "profile is [5, 3] but must rise and end by max_steps, 6"),
        ("[5,7]", "profile is [5, 7] but must rise and end by max_steps, 6"),
        ("0", "trainer.profile is 0, expected an integer > 0 or a list of 2 integers or null"),
    ],
)
def test_a_range_that_is_never_reached_is_refused(value: str, sentence: str, capsys) -> None:
    assert fit.main([*SHORT, f"trainer.profile={value}"]) == 2
    assert sentence in capsys.readouterr().err


# The summary.


def test_the_summary_accounts_for_the_time_and_names_sizes(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(settings) -> dict[str, Any]:
        return {"rows": []}

    monkeypatch.setattr("trainers.evaluate.run", evaluate)
    words = [word for word in SHORT if not word.startswith("evaluate")]
    assert fit.main([*words, "run=mine", "trainer.sample_every=3"]) == 0
    summary = json.loads((fake / "mine/summary.json").read_text())
    assert list(summary["seconds"]) == ["start_up", "training", "samples", "export", "evaluation"]
    assert all(seconds >= 0 for seconds in summary["seconds"].values()) and summary["seconds"]["samples"] > 0
    assert (summary["resumed_at"], summary["steps"], summary["processes"], summary["device"]) == (0, 6, 1, "cpu")
    trained = summary["seconds"]["training"]
    # The file's seconds are rounded to a millisecond.
    assert 6 / summary["steps_per_s"] == pytest.approx(trained, abs=1e-3)
    assert 24 / summary["images_per_s"] == pytest.approx(trained, abs=1e-3)
    assert summary["checkpoint_bytes"] == (fake / "mine/checkpoints/step_0000006.ckpt").stat().st_size
    assert summary["adapter_bytes"] == (fake / "mine/adapter/mean").stat().st_size
    assert summary["memory_mib"] > 50
    assert fit.main(["resume=outputs/ilf_pixart/mine", "trainer.max_steps=8", "evaluate=false"]) == 0
    later = json.loads((fake / "mine/summary.json").read_text())
    assert (later["resumed_at"], later["steps"]) == (6, 8) and "evaluation" not in later["seconds"]


def test_a_watch_leaves_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 13.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.lap("start_up")
    watch.move("start_up", training=6.0, samples=1.0)
    watch.lap("export")
    watch.lap("export")
    assert watch.parts == {"start_up": 3.0, "training": 6.0, "samples": 1.0, "export": 4.0}


def test_clock_and_sizes() -> None:
    assert [metrics.clock(seconds) for seconds in (0.2, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
    assert [metrics.size_text(size) for size in (512, 2**20, 3 * 2**20)] == ["0.5 KiB", "1.0 MiB", "3.0 MiB"]


@pytest.mark.slow
def test_two_ranks_share_one_log_and_each_has_a_trace(fake: Path) -> None:
    """The first rank writes; its loss is the mean over both, its memory the larger; W&B has one run."""
    pytest.importorskip("wandb")
    code = (
        "import sys\n"
        "import torch\n"
        "from tests.test_commands import Fake\n"
        "from trainers import fit, training\n"
        "class Ranked(Fake):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return super().training_step(batch, batch_idx) * 0 + float(1 + 2 * self.global_rank)\n"
        "training.build_task = Ranked\n"
        "sys.exit(fit.main(sys.argv[1:]))\n"
    )
    script = fake.parents[1] / "ranked.py"
    script.write_text(code)
    words = [*SHORT, "run=mine", "trainer.devices=2", "trainer.log_every=2", "trainer.profile=2"]
    more = ["logger=[csv,wandb]", "wandb.mode=offline"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), *words, *more], env=environment, check=True, timeout=200)
    found = rows(RunFolder(fake / "mine"))
    assert [float(row["loss"]) for row in found] == [2.0] * 3
    assert sorted(path.name for path in (fake / "mine/profile").iterdir()) == [
        "operations.txt", "trace_rank0.json.gz", "trace_rank1.json.gz"
    ]  # fmt: skip
    assert len(list((fake / "mine/wandb").glob("offline-run-*"))) == 1
    assert json.loads((fake / "mine/summary.json").read_text())["processes"] == 2
