"""The public name `afterburner`: cheap to import, and a console command that says what it can do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_importing_the_facade_imports_neither_torch_nor_hugging_face():
    code = "import sys, afterburner; print(afterburner.__version__, *sys.modules)"
    version, *names = run("-c", code).stdout.split()
    assert version == "0.1.0"
    assert not {name.partition(".")[0] for name in names} & {"torch", "transformers", "diffusers", "huggingface_hub"}


@pytest.mark.parametrize(("given", "words"), [((), "no command was given"), (("train",), "'train' is not a command")])
def test_an_unknown_command_is_one_sentence(given, words):
    done = run("-m", "afterburner", *given)
    assert done.returncode == 1
    assert done.stderr.startswith(words) and "afterburner fit --help" in done.stderr and "Traceback" not in done.stderr


def test_the_console_command_is_the_module_of_a_checkout():
    assert run("-m", "afterburner", "fit", "--list").stdout == run("-m", "trainers.fit", "--list").stdout != ""
