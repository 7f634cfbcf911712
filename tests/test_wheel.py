"""The wheel installs one name and works in a folder that has its own `data/`, `modules/` and `kernels/`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = ("checkpoints", "data", "kernels", "modules", "trainers")


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_hook", ROOT / ".ci" / "wheel_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("from modules.x import y", "from afterburner.modules.x import y"),
        ("from modules import x", "from afterburner.modules import x"),
        ("import kernels", "import afterburner.kernels as kernels"),
        ("import os, kernels, data as d", "import os, afterburner.kernels as kernels, afterburner.data as d"),
        ("import modules.x as x", "import afterburner.modules.x as x"),
        (
            "if a:\n    é = 1; from data.x import (\n        y,\n    )",
            "if a:\n    é = 1; from afterburner.data.x import (\n        y,\n    )",
        ),
        ("import database\nfrom data_tools import x", "import database\nfrom data_tools import x"),
        ("'''from modules.x import y'''", "'''from modules.x import y'''"),
        ("from datasets import data", "from datasets import data"),
        ("import_module(f'{prefix}modules.x')", "import_module(f'{prefix}modules.x')"),
    ],
)
def test_own_imports_are_rewritten_and_nothing_else(hook, source, want):
    assert hook.rewritten(source.encode(), Path("x.py")).decode() == want


@pytest.mark.parametrize(
    "source",
    [
        "import modules.x",
        "importlib.import_module('modules.x')",
        "import_module(f'modules.{x}')",
        "from \\\n  data import x",
    ],
)
def test_what_cannot_be_rewritten_stops_the_build(hook, source):
    with pytest.raises(ValueError, match=r"x\.py:1: "):
        hook.rewritten(source.encode(), Path("x.py"))


def test_the_wheel_has_one_name_and_all_that_the_commands_read(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"afterburner", "afterburner-0.1.0.dist-info"}
    tracked = subprocess.run(["git", "ls-files", *OWN, "recipes"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {f"afterburner/{name}" for name in tracked.stdout.split("\n") if name}
    assert not wanted - set(names)
    assert not [name for name in names if "__pycache__" in name or "/." in name]


SMOKE = """
import importlib, pkgutil, sys, torch
import data, kernels, modules
assert data.MARK == modules.MARK == kernels.MARK == "the user's"
import afterburner
from afterburner.checkpoints.load import known_methods, read_tensors
from afterburner.checkpoints.manifest import AdapterError, Manifest
from afterburner.checkpoints.save import write_adapter

manifest = Manifest(method="absent", module={}, base_model_name_or_path="x", base_model_fingerprint="sha256:0")
write_adapter("adapter", manifest, {"a": torch.ones(2)}, "card")
assert read_tensors("adapter")["a"].tolist() == [1, 1]
try:
    afterburner.load_adapter(torch.nn.Linear(1, 1), "adapter")
except AdapterError as error:
    assert all(method in str(error) for method in known_methods())
for found in pkgutil.walk_packages(afterburner.__path__, "afterburner."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
ours = [name for name, module in sys.modules.items() if name.split(".")[0] in OWN and not hasattr(module, "MARK")]
assert not ours, ours
print("fine")
"""


@pytest.mark.slow
def test_the_wheel_works_beside_folders_of_the_same_names(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    for name in ("data", "modules", "kernels"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text('MARK = "the user\'s"\n')
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(sys.executable, "-c", SMOKE.replace("OWN", repr(OWN))).strip().endswith("fine")
    recipes = run(sys.executable, "-m", "afterburner.trainers.fit", "--list")
    assert all(path.stem in recipes for path in (ROOT / "recipes").glob("[a-z]*.yaml"))
    assert run(sys.executable, site / "bin" / "afterburner", "fit", "--list") == recipes
    assert sorted(path.name for path in work.iterdir()) == ["adapter", "data", "kernels", "modules"]
