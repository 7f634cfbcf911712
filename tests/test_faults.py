"""Whatever goes wrong: one sentence, an exit code that says what, nothing half-written, and the run goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import distributed

from data.inputs import training_inputs
from tests import fault_run
from trainers import export, fit, recipes, training
from trainers.base import NonFiniteLoss
from trainers.callbacks import read_checkpoint
from trainers.failures import FAILED, LOST, NOT_FINITE, explain
from trainers.run_folder import RunFolder

ROOT = Path(recipes.__file__).parents[1]
SHORT = [
    "recipe=ilf_pixart",
    "evaluate=false",
    "trainer.accelerator=cpu",
    "trainer.max_steps=8",
    "trainer.save_every=2",
]
NOBODY = 65534


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`fault(NAME)` makes the next runs those of the task NAME; returns where runs are."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def choose(task: type) -> Path:
        monkeypatch.setattr(training, "build_task", task)
        return tmp_path / "outputs/ilf_pixart"

    return choose


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run ended with; libraries may have warned before it."""
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in told, told
    return errors[0]


def adapter_of(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def assert_resumes_to_the_same(run: Path, *more: str) -> None:
    """The run goes on without its fault, and ends where one without any fault does; nothing is left over."""
    training.build_task = fault_run.Tiny
    assert fit.main([f"resume={run}"]) == 0
    assert fit.main([*SHORT, *more, "run=whole"]) == 0
    assert adapter_of(run) == adapter_of(run.parent / "whole")
    assert {path.name for path in run.rglob("*") if path.name.startswith(".")} == set()
    assert not (run / "failure.txt").exists()


@contextmanager
def mounted(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A small file system of its own; skips where this user cannot make one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions count: root would be let through."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def fill(folder: Path) -> None:
    """Take all the room there is."""
    with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("moment", ["checkpoint", "metrics", "export"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(moment: str, tmp_path, fault, capsys) -> None:
    disk = tmp_path / "outputs"

    class Fills(fault_run.Tiny):
        def fault(self) -> float:
            if moment != "export":
                fill(disk)
            return 1.0

        def export_adapter(self, folder: Path) -> None:
            fill(disk)
            super().export_adapter(folder)

    logger = "csv" if moment == "metrics" else "none"
    with mounted(disk):
        run = fault(Fills) / "a"
        assert fit.main([*SHORT, f"logger={logger}", "trainer.log_every=1", "run=a"]) == FAILED
        told = sentence(capsys)
        last = 8 if moment == "export" else 2
        place = {"checkpoint": "checkpoints/step_0000004.ckpt", "metrics": "metrics.csv", "export": "adapter"}[moment]
        assert "the disk is full" in told and place in told and f"step_000000{last}.ckpt is kept" in told
        assert RunFolder(run).latest_checkpoint().name == f"step_000000{last}.ckpt"
        assert read_checkpoint(RunFolder(run).latest_checkpoint())["global_step"] == last
        assert not list(run.rglob(".*.tmp")) and not (run / "adapter").exists()
        (disk / "filler").unlink()
        assert_resumes_to_the_same(run, f"logger={logger}", "trainer.log_every=1")


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path: Path, fault, capsys) -> None:
    with mounted(tmp_path / "outputs", "64k") as disk:
        fault(fault_run.Tiny)
        fill(disk)
        assert fit.main(SHORT) in (1, 2)
        assert "disk is full" in (told := sentence(capsys)) or "No space" in told
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_read_only_folder_is_one_sentence(tmp_path: Path, fault, capsys) -> None:
    with mounted(tmp_path / "outputs") as disk:
        run = fault(fault_run.Stops) / "a"
        assert fit.main([*SHORT, "run=a"]) == 128 + signal.SIGTERM
        capsys.readouterr()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert fit.main([f"resume={run}"]) == 2
        assert f"{run} cannot be written (Read-only file system)" in sentence(capsys)
        assert fit.main(SHORT) == 2
        assert "choose output_dir=FOLDER" in sentence(capsys)


@pytest.mark.parametrize("damage", ["cut off", "one byte", "empty"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(damage: str, fault, capsys) -> None:
    run = fault(fault_run.Tiny) / "a"
    assert fit.main([*SHORT, "trainer.max_steps=6", "run=a"]) == 0
    newest = RunFolder(run).latest_checkpoint()
    spoil(newest, damage)
    assert export.main([f"run={run}"]) == FAILED
    assert f"{newest} is not a checkpoint that can be read" in sentence(capsys)
    (run / "adapter/adapter_model.safetensors").unlink()
    assert fit.main([f"resume={run}", "trainer.max_steps=6"]) == 0
    warning = capsys.readouterr().err
    assert f"{newest} is damaged" in warning and "going on from" in warning and "step_0000004.ckpt" in warning
    assert newest.with_name("step_0000006.ckpt.damaged").is_file()
    assert fit.main([*SHORT, "trainer.max_steps=6", "run=whole"]) == 0
    assert adapter_of(run) == adapter_of(run.parent / "whole")
    for path in RunFolder(run).saved_checkpoints():
        spoil(path, damage)
    assert fit.main([f"resume={run}"]) == FAILED
    assert "none of the 2 checkpoints can be read, start a new run" in sentence(capsys)


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "one byte":  # of a weight, where torch.load itself notices nothing
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if "/data/" in e.filename)
        start = content.index(b"FB", entry.header_offset)  # padding before the tensor
        content[start + content[start:].index(b"Z" * 4) + 60] ^= 1
    path.write_bytes({"cut off": content[: len(content) // 2], "empty": b""}.get(damage, content))


@pytest.mark.parametrize("task", [fault_run.WorkerKilled, fault_run.WorkerRaises])
def test_a_data_loading_process_that_fails_is_one_sentence(task: type, fault, capsys) -> None:
    run = fault(task) / "a"
    assert fit.main([*SHORT, "trainer.num_workers=2", "run=a"]) == FAILED
    told = sentence(capsys)
    assert "a data-loading process" in told and ".ckpt is kept, continue with resume=" in told
    assert ("picture 17 is truncated" if task is fault_run.WorkerRaises else "lower trainer.num_workers") in told
    assert_resumes_to_the_same(run, "trainer.num_workers=2")


def test_an_error_nobody_foresaw_keeps_its_traceback(fault, capsys) -> None:
    run = fault(fault_run.Wrong) / "a"
    assert fit.main([*SHORT, "run=a"]) == FAILED
    assert "KeyError at fault_run.py:" in (told := sentence(capsys)) and "failure.txt" in told
    assert "Traceback" in (run / "failure.txt").read_text()
    assert_resumes_to_the_same(run)


@pytest.mark.parametrize("times", [1, 2])
def test_control_c_saves_and_a_second_one_ends_at_once(times: int, fault, capsys) -> None:
    class Interrupted(fault_run.Tiny):
        def fault(self) -> float:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return 1.0

    before = signal.getsignal(signal.SIGINT)
    run = fault(Interrupted) / "a"
    try:
        assert fit.main([*SHORT, "run=a"]) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
    told = sentence(capsys)
    assert ("stopped by SIGINT after step 4" if times == 1 else "interrupted") in told
    assert f"step_000000{4 if times == 1 else 2}.ckpt is kept" in told
    assert_resumes_to_the_same(run)


def test_a_resumed_run_that_cannot_begin_keeps_its_folder(fault, capsys) -> None:
    class Gone(fault_run.Tiny):
        def __init__(self, recipe) -> None:
            raise OSError("no such backbone")

    run = fault(fault_run.Tiny) / "a"
    run.mkdir(parents=True)
    RunFolder(run).begin(recipes.compose_recipe("ilf_pixart", {}), [])
    fault(Gone)
    assert fit.main([f"resume={run}"]) == FAILED
    assert "no such backbone" in sentence(capsys) and (run / "config.yaml").is_file()


HOLD = """
import sys, time
from pathlib import Path
from trainers.crew import Seats
assert Seats(Path(sys.argv[1]), 0).take()
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_has_one_run_at_a_time_and_a_killed_one_blocks_nobody(fault, capsys) -> None:
    run = fault(fault_run.Stops) / "a"
    assert fit.main([*SHORT, "run=a"]) == 128 + signal.SIGTERM
    capsys.readouterr()
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        assert fit.main([f"resume={run}"]) == 2
        assert f"is being written by process {other.pid} on " in sentence(capsys)
        assert before == {path: path.read_bytes() for path in before}
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert (run / ".lock").exists()
    assert_resumes_to_the_same(run)


def test_prompts_that_cannot_be_read_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_bytes(b"a circle\n\xff\xfe")
    with pytest.raises(ValueError, match=r"prompts.txt is no UTF-8 text: byte 9 is 0xff"):
        training_inputs("folder", str(path), 0, 2)
    path.chmod(0)
    with unprivileged(), pytest.raises(OSError) as caught:
        training_inputs("folder", str(path), 0, 2)
    assert f"{path} may not be opened by this user" in explain(caught.value).sentence


def raised(*action) -> BaseException:
    try:
        action[0](*action[1:])
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_libraries_say_becomes_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 40)
    from safetensors.torch import load_file

    damaged = raised(load_file, tmp_path / "a.safetensors")
    assert isinstance(damaged, SafetensorError) and not explain(damaged).unexpected
    assert "memory ran out" in explain(raised(torch.empty, 2**52)).sentence
    assert "memory ran out" in explain(MemoryError()).sentence
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
    assert "Tried to allocate 2.00 GiB): lower data.batch_size" in explain(full).sentence
    for lost in (
        distributed.DistBackendError("NCCL error in: x.cpp:1"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:123"),
    ):
        assert explain(lost).severed and explain(lost).code == LOST
    assert not explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).severed
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).unexpected


def test_what_ended_training_counts_more_than_what_failed_on_the_way_out() -> None:
    try:
        try:
            raise NonFiniteLoss("the loss is not finite")
        except NonFiniteLoss:
            raise OSError(28, "No space left on device", "metrics.csv")  # noqa: B904
    except OSError as error:
        assert explain(error).code == NOT_FINITE
