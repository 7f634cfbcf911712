"""The W&B run: everything that metrics.csv holds and more, one run however often resumed, and never in the way."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_commands import SHORT, Fake
from tests.test_report import table
from tests.wandb_server import KEY, wandb_server
from trainers import fit, loggers, recipes, training
from trainers.callbacks import WandbRun
from trainers.report import build_report, write_report
from trainers.run_folder import RunFolder

wandb = pytest.importorskip("wandb")

ROOT = Path(recipes.__file__).parents[1]
BOTH = [*SHORT, "logger=[csv,wandb]", "trainer.log_every=2", "run=mine"]
RUN = Path("outputs/ilf_pixart/mine")
# Differs between two runs of the same thing.
MEASURED = ("step_s", "images_per_s", "memory_mib")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user without a key in an empty folder, and a method that trains in no time."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "SLURM_"))]:
        monkeypatch.delenv(name)
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.chdir(work)
    monkeypatch.setattr(training, "build_task", Fake)
    monkeypatch.setattr(Fake, "loss_at", {})
    yield
    wandb.teardown()


@cache
def records(part: Path) -> list[dict[str, Any]]:
    """What W&B itself reads in a part's folder."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept(part: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records(part) if record["type"] == kind]


def history(*parts: Path) -> dict[int, dict[str, Any]]:
    """Rows by our step, of all parts; what a later part says of a step counts."""
    rows: dict[int, dict[str, Any]] = {}
    for item in (record["item"] for part in parts for record in kept(part, "history")):
        rows.setdefault(int(item["step"]), {}).update(item)
    return rows


def parts_of(run: Path) -> list[Path]:
    return sorted((run.resolve() / "wandb").glob("offline-run-*"))


def csv_rows(run: Path) -> dict[int, dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def assert_rows_are_those_of_csv(logged: dict[int, dict[str, Any]], run: Path, drop: tuple[str, ...] = ()) -> None:
    """Every metric of every row, under the same name and step."""
    assert (want := csv_rows(run))
    for step, row in want.items():
        for name, value in row.items():
            if name not in drop:
                assert float(value) == pytest.approx(float(logged[step][name]), rel=1e-5), (step, name)


def test_an_offline_run_holds_all_that_the_folder_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fit.main([*BOTH, "trainer.sample_every=3", "wandb.project=proj", "wandb.tags=[one,two]"]) == 0
    told = capsys.readouterr()
    assert "W&B is offline because no key is configured" in told.out and f"wandb sync {RUN}/wandb/" in told.out
    assert "warning" not in told.err
    (part,) = parts_of(RUN)
    rows = history(part)
    assert_rows_are_those_of_csv(rows, RUN)
    pictures = [part / "files" / rows[step]["samples.path"] for step in (3, 6)]
    assert [path.read_bytes() for path in pictures] == [p.read_bytes() for p in sorted((RUN / "samples").iterdir())]

    (run,) = kept(part, "run")[:1]
    assert run["run_id"] == (RUN / "wandb_id").read_text().strip()
    assert (run["project"], run["display_name"], run["tags"]) == ("proj", "ilf_pixart/mine", ["one", "two"])
    config = run["config"]["update"]
    stored = recipes.stored_recipe(str(RUN), "run").model_dump(mode="json")
    assert {name: config[name] for name in ("seed", "optimizer", "module", "trainer")} == {
        name: stored[name] for name in ("seed", "optimizer", "module", "trainer")
    }
    provenance = json.loads((RUN / "provenance.json").read_text())
    assert config["provenance"]["argv"] == provenance["argv"] and config["provenance"]["versions"]

    (artifact,) = kept(part, "artifact")
    (file,) = artifact["manifest"]["contents"]
    assert artifact["type"] == "adapter" and file["path"] == "mean"
    copy = Path(file["local_path"])
    assert copy.read_bytes() == (RUN / "adapter/mean").read_bytes()
    assert copy.is_relative_to(RUN.resolve())
    summary = json.loads((RUN / "summary.json").read_text())
    assert any(update["update"].get("adapter_bytes") == summary["adapter_bytes"] for update in kept(part, "summary"))
    assert kept(part, "exit")[0]["exit_code"] == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["outputs"]


def test_a_resumed_run_is_one_run_and_equals_the_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit.main([*SHORT, "trainer.log_every=1", "run=whole"]) == 0

    def terminate() -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    monkeypatch.setattr(Fake, "loss_at", {2: terminate})
    assert fit.main([*BOTH, "trainer.log_every=1"]) == 143
    monkeypatch.setattr(Fake, "loss_at", {})
    assert fit.main([f"resume={RUN}"]) == 0
    first, second = parts_of(RUN)
    assert [kept(part, "run")[0]["run_id"] for part in (first, second)] == [(RUN / "wandb_id").read_text().strip()] * 2
    assert kept(first, "exit")[0]["exit_code"] == 1 and kept(second, "exit")[0]["exit_code"] == 0
    assert sorted(history(first)) == [1, 2, 3] and sorted(history(second)) == [4, 5, 6]
    rows = history(first, second)
    assert_rows_are_those_of_csv(rows, RUN)
    assert_rows_are_those_of_csv(rows, RUN.with_name("whole"), drop=MEASURED)


def test_the_report_its_table_and_its_plot_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe = RunFolder(RUN), recipes.compose_recipe("ilf_pixart", {"wandb.mode": "offline"})
    rows = table()
    report = build_report(rows, method="ilf", backbone="tiny", device="cpu", commit="abc", seed=0, verdict=None)
    write_report(folder.path, report, rows)
    folder.adapter.mkdir()
    (folder.adapter / "adapter.safetensors").write_bytes(b"tensors")
    run = WandbRun(recipe, folder)
    run.setup(training_stub(), None, "fit")
    run.log_results(report, {"steps": 150})
    run.finish()
    assert capsys.readouterr().err == ""
    (part,) = parts_of(RUN)
    row = history(part)[150]
    stored = json.loads((part / "files" / row["report.path"]).read_text())
    cells = [dict(zip(stored["columns"], line, strict=True)) for line in stored["data"]]
    assert [cell["name"] for cell in cells] == [row["name"] for row in report["rows"]]
    assert cells[1]["psnr_db"] == 34.0 and cells[1]["speedup_low"] == pytest.approx(1.8) and cells[1]["blocks"] == 50
    assert (part / "files" / row["speed_quality.path"]).read_bytes() == (RUN / "report.png").read_bytes()
    assert (part / "files" / row["report_samples.path"]).read_bytes() == (RUN / "samples/grid.png").read_bytes()


def training_stub(rank: int = 0) -> Any:
    return type("Ranked", (), {"is_global_zero": rank == 0})()


def test_only_the_first_rank_has_a_run() -> None:
    run = WandbRun(recipes.compose_recipe("ilf_pixart"), RunFolder(RUN))
    run.setup(training_stub(rank=1), None, "fit")
    run.log_row({"step": 1, "loss": 0.0})
    run.log_results(None, {"steps": 1})
    run.finish()
    assert not Path("outputs").exists()


def test_a_killed_run_loses_no_more_than_its_last_second() -> None:
    """The folder is read while the run is open, as if it had been killed now."""
    RUN.mkdir(parents=True)
    run = WandbRun(recipes.compose_recipe("ilf_pixart", {"wandb.mode": "offline"}), RunFolder(RUN))
    run.setup(training_stub(), None, "fit")
    run.log_row({"step": 1, "loss": 1.5})
    time.sleep(3)
    assert history(*parts_of(RUN))[1]["loss"] == 1.5
    run.finish()


def test_an_online_run_is_sent_and_continued(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert fit.main([*BOTH, "wandb.mode=online", "trainer.sample_every=3"]) == 0
        assert fit.main([f"resume={RUN}", "trainer.max_steps=8"]) == 0
        wandb.teardown()
        told = capsys.readouterr()
        identity = (RUN / "wandb_id").read_text().strip()
        assert list(server.runs) == [identity] and f"/runs/{identity}" in told.out and "warning" not in told.err
        rows: dict[int, dict[str, Any]] = {}
        for row in server.rows(identity):
            rows.setdefault(row["step"], {}).update(row)
        assert_rows_are_those_of_csv(rows, RUN)
        assert sorted(rows) == [2, 3, 4, 6, 8] and rows[3]["samples"]["path"] in server.files
        assert [artifact["input"]["artifactTypeName"] for artifact in server.artifacts] == ["adapter"] * 2


def test_a_server_that_hangs_up_costs_seconds_and_not_the_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr("trainers.callbacks.wandb._INIT_SECONDS", 2)
    with wandb_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        answer = server.answer

        def hang_up(operation: str, variables: dict[str, Any]) -> Any:
            if operation == "UpsertBucket":
                raise ConnectionError
            return answer(operation, variables)

        monkeypatch.setattr(server, "answer", hang_up)
        assert fit.main(BOTH) == 0
        assert "W&B is offline because it did not begin online (" in capsys.readouterr().out
        assert fit.main([*BOTH, "run=insists", "wandb.mode=online"]) == 1
        assert "W&B did not begin (" in capsys.readouterr().err and not RUN.with_name("insists").exists()
    assert_rows_are_those_of_csv(history(*parts_of(RUN)), RUN)


@pytest.mark.slow
def test_a_server_that_goes_away_costs_a_warning(monkeypatch, capsys) -> None:
    monkeypatch.setattr("trainers.callbacks.wandb._FINISH_SECONDS", 2)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with wandb_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)

        def leave() -> float:
            server.shutdown()
            server.server_close()
            return 0.0

        monkeypatch.setattr(Fake, "loss_at", {3: leave})
        assert fit.main(BOTH) == 0
    told = capsys.readouterr().err
    assert told.count("warning: W&B") == 1 and f"{RUN}/wandb for wandb sync" in told
    (part,) = (RUN.resolve() / "wandb").glob("run-*")
    assert_rows_are_those_of_csv(history(part), RUN)


def test_an_offline_run_can_be_sent_later() -> None:
    assert fit.main(BOTH) == 0
    with wandb_server() as server:
        environment = os.environ | server.environment()
        command = [sys.executable, "-m", "wandb", "sync", *map(str, parts_of(RUN))]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
        identity = (RUN / "wandb_id").read_text().strip()
        assert_rows_are_those_of_csv({row["step"]: row for row in server.rows(identity)}, RUN)


def test_online_without_a_key_is_refused_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main([*BOTH, "wandb.mode=online"]) == 2
    assert "wandb.mode is online but no key is configured" in (told := capsys.readouterr()).err
    assert told.err.count("\n") == 1 and told.out == "" and not Path("outputs").exists()


@pytest.mark.parametrize(("mode", "code"), [("online", 2), ("auto", 0)])
def test_a_server_that_is_not_there_is_told_in_one_sentence(mode: str, code: int, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    assert fit.main([*BOTH, f"wandb.mode={mode}"]) == code
    told = capsys.readouterr()
    assert (told.out + told.err).count("signing in failed") == 1
    assert Path("outputs").exists() == (mode == "auto")
    if mode == "auto":
        assert_rows_are_those_of_csv(history(*parts_of(RUN)), RUN)


def test_the_usual_mode_of_the_user_counts(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert fit.main(BOTH) == 0
    assert "W&B is offline because WANDB_MODE is offline" in capsys.readouterr().out and len(parts_of(RUN)) == 1


def test_without_the_extra_one_sentence_and_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from trainers import fit\n"
        "code = fit.main(sys.argv[1:])\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "recipe=ilf_pixart", "logger=wandb"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install afterburner[train]" in done.stderr and not list(Path.cwd().iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds W&B's process in /proc")
def test_training_goes_on_when_the_service_dies(monkeypatch, capsys) -> None:
    def kill_service() -> float:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"\nPPid:\t{os.getpid()}\n" in (entry / "status").read_text()
                if ours and b"wandb-core" in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(entry.name)
            except OSError:
                continue
        return 0.0

    killed: list[str] = []
    monkeypatch.setattr(Fake, "loss_at", {2: kill_service})
    assert fit.main([*BOTH, "trainer.max_steps=40", "trainer.log_every=1"]) == 0
    assert killed and capsys.readouterr().err.count("warning: W&B logging") == 1
    assert sorted(csv_rows(RUN)) == list(range(1, 41)) and (RUN / "adapter/mean").is_file()


def test_a_figure_that_cannot_be_logged_is_told_once_and_the_rest_is(capsys) -> None:
    run = WandbRun(recipes.compose_recipe("ilf_pixart", {"wandb.mode": "offline"}), RunFolder(RUN))
    RUN.mkdir(parents=True)
    run.setup(training_stub(), None, "fit")
    run.log_row({"step": 1, 7: torch.ones(1)})
    run.log_row({"step": 2, 7: torch.ones(1)})
    run.log_row({"step": 3, "loss": 1.5})
    run.finish()
    assert capsys.readouterr().err.count("warning: W&B logging is incomplete") == 1
    assert history(*parts_of(RUN))[3]["loss"] == 1.5


@pytest.mark.parametrize(
    ("logger", "wandb_too", "csv_too"), [("csv", False, True), ("none", False, False), ("wandb", True, False)]
)
def test_a_logger_writes_its_own_files_only(logger: str, wandb_too: bool, csv_too: bool) -> None:
    assert fit.main([*SHORT, "run=mine", f"logger={logger}"]) == 0
    assert (RUN / "wandb").exists() == (RUN / "wandb_id").exists() == wandb_too
    assert (RUN / "metrics.csv").exists() == csv_too


def test_dry_run_starts_no_run(monkeypatch) -> None:
    monkeypatch.setattr(training, "load_adapter", lambda *_: type("Handle", (), {"detach": lambda self: None})())
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("a run was begun"))
    assert fit.main([*SHORT, "--dry-run", "logger=wandb"]) == 0


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("logger=[csv,none]", 'logger is ["csv", "none"], expected one of csv, wandb, none or a list of csv and wandb'),
        ("wandb.mode=on", "wandb.mode is 'on', expected one of auto, online, offline"),
        ("wandb.project=a/b", "wandb.project is 'a/b', expected a name without any of"),
    ],
)
def test_refusals(word: str, sentence: str, capsys) -> None:
    assert fit.main([*SHORT, word]) == 2
    assert sentence in capsys.readouterr().err


def test_signing_in_never_asks(monkeypatch) -> None:
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        assert loggers.sign_in() == "no key is configured (`wandb login`, or WANDB_API_KEY)"


@pytest.mark.slow
def test_wandb_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys\n"
        "from tests.test_commands import Fake, SHORT\n"
        "from trainers import fit, training\n"
        "training.build_task = Fake\n"
        "assert fit.main(SHORT) == 0 and 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
