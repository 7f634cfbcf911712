"""Every command and every line of Python in the README runs, in its order, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Only sizes: what a command does stays what the README says.
SMALL = {
    "trainers.fit": "trainer.max_steps=2 data.trajectories=8 data.holdout=2 data.batch_size=4 evaluation.inputs=2 "
    "evaluation.timing_batch=2 evaluation.batch_size=2",
    "trainers.evaluate": "evaluation.inputs=2 evaluation.timing_batch=2 evaluation.batch_size=2",
}


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    """The words of every line of its shell blocks, without comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


def test_the_first_command_stands_on_the_first_screen():
    first = next(i for i, line in enumerate(README.splitlines(), 1) if line.startswith("make "))
    assert first <= 25


def test_make_targets_exist():
    for words in [words for words in commands() if words[0] == "make"]:
        assert run(["make", "-n", *words[1:]], ROOT).returncode == 0, words


def test_commands_and_python_run_in_the_order_they_stand(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    ours = [words for words in commands() if words[0] == "python"]
    assert {words[2] for words in ours} >= {"trainers.fit", "trainers.evaluate", "trainers.export"}
    for words in ours:
        small = [] if "--help" in words else SMALL.get(words[2], "").split()
        given = {word.partition("=")[0] for word in small}
        kept = [word for word in words[1:] if word.partition("=")[0] not in given]
        done = run([sys.executable, *kept, *small], tmp_path)
        assert done.returncode == 0, (words, done.stderr[-2000:])
    assert (tmp_path / "outputs/ilf_pixart/000/report.json").is_file()
    for code in blocks("python"):
        done = run([sys.executable, "-c", code], tmp_path)
        assert done.returncode == 0, (code, done.stderr[-2000:])
