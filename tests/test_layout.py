"""Imports flow one way, a method is found by its name, and our generic folder names hide nobody's package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "afterburner": {"checkpoints", "modules"},
    "trainers": {"data", "checkpoints", "modules", "kernels"},
    "data": {"modules"},
    "checkpoints": {"modules"},
    "modules": {"kernels"},
    "kernels": set(),
}
NEVER = {  # heavy or foreign to the folder
    "modules": {"lightning", "hydra", "pydantic", "huggingface_hub"},
    "kernels": {"lightning", "hydra", "pydantic", "huggingface_hub", "transformers", "diffusers"},
    "checkpoints": {"lightning", "hydra", "pydantic", "pickle"},
}
TORCH_FREE = [
    "trainers/config.py",
    "trainers/recipes.py",
    *sorted(f"{p}" for p in Path("trainers/schemas").glob("*.py")),
]
MAX_LINES = 400
FOLDERS = [*MAY_IMPORT, "tests", "benchmarks", ".ci"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Names of Hugging Face's `kernels`; a file of ours with such a name would be found instead of theirs, or never.
THEIRS = set(
    "backends benchmark cli compat deps hf_hub importer install layer load lockfile validate variants verify".split()
)


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every absolute import of a file, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            assert not any(alias.name == "*" for alias in node.names), f"{path}:{node.lineno} imports *"
            found.append((node.lineno, str(node.module)))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


def top_level_imports(path: Path) -> set[str]:
    """Roots of what importing the file imports at once."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = [
        [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return {str(name).partition(".")[0] for group in names for name in group}


def methods() -> list[str]:
    """Stems in both folders: that is what a method is."""
    stems = [
        {p.stem for p in (ROOT / folder).glob("[a-z]*") if p.suffix == ".py" or p.is_dir()}
        for folder in ("modules", "trainers")
    ]
    return sorted(stems[0] & stems[1])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_flow_one_way(folder):
    forbidden = (MAY_IMPORT.keys() | {"tests", "benchmarks"}) - MAY_IMPORT[folder] - {folder} | NEVER.get(folder, set())
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports_of(path)
        if name.partition(".")[0] in forbidden
    ]
    assert not wrong


def test_an_arrow_backwards_would_be_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from trainers.base import FrozenBackboneTask\n    import lightning as L\n")
    assert imports_of(path) == [(2, "trainers.base"), (3, "lightning")]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_a_configuration_needs_is_imported_without_torch(name):
    heavy = {
        "torch",
        "lightning",
        "transformers",
        "diffusers",
        "checkpoints",
        "modules",
        "data",
        "matplotlib",
        "scipy",
        "sklearn",
    }
    assert not top_level_imports(ROOT / name) & heavy


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize(
    "pattern",
    ["trainers/schemas/{}.py", "recipes/{}_*.yaml", "tests/test_{}*.py", "docs/methods/{}.md"],
)
def test_every_method_is_found_by_its_name(method, pattern):
    assert list(ROOT.glob(pattern.format(method))), f"{method} has no {pattern.format(method)}"


@pytest.mark.parametrize("folder", ["recipes", "docs/methods", "trainers/schemas", "kernels"])
def test_no_file_belongs_to_a_method_that_is_not_there(folder):
    stems = {path.stem for path in (ROOT / folder).glob("[a-z]*.*") if path.name != "__init__.py"}
    # A paper's second version is the same method: medusa2_vicuna_7b.  So is another paper that trains the same module.
    names = [*methods(), "l2c"]
    strays = {stem for stem in stems if not any(stem == m or re.match(rf"{m}\d?_", stem) for m in names)}
    assert not strays


def test_kernels_gives_way_to_the_package_of_the_same_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not {path.stem for path in (ROOT / "kernels").iterdir()} & THEIRS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_can_hold(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


THEIR_KERNELS = '''
"""Stands in for Hugging Face's package: every public name is a class that can be called, subclassed and registered."""
class _Anything:
    TRAINING = INFERENCE = TORCH_COMPILE = FALLBACK = 1
    def __init__(self, *args, **kwargs): pass
    def __class_getitem__(cls, item): return cls
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Anything,), {})
def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*functions): return lambda cls: cls
use_kernel_func_from_hub = use_kernel_forward_from_hub
MARK = "theirs"
'''
PROBE = """
import importlib, sys
for name in {order}:
    importlib.import_module(name)
import kernels, modules
from transformers import LlamaConfig, LlamaForCausalLM, T5EncoderModel
from diffusers import DiTTransformer2DModel, PixArtAlphaPipeline, PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model
from transformers.utils.import_utils import is_kernels_available
assert getattr(kernels, "MARK", None) == {mark!r}, kernels
assert is_kernels_available() is {present}
shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
model = LlamaForCausalLM(LlamaConfig(**shape))
get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
model(input_ids=__import__("torch").tensor([[1, 2]]))
assert any(path.startswith({root!r}) for path in kernels.__path__), list(kernels.__path__)
import kernels.probe_method
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [["modules", "transformers"], ["transformers", "modules"]], ids="-".join)
@pytest.mark.parametrize("place", ["absent", "before", "after"])
def test_transformers_diffusers_and_peft_import_beside_our_kernels(tmp_path, order, place):
    """With Hugging Face's `kernels` absent, before or after ours on the path, and whichever is imported first."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    (ours / "kernels").mkdir(parents=True)
    (ours / "kernels" / "probe_method.py").write_text("")
    (ours / "modules").mkdir()
    (ours / "modules" / "__init__.py").write_text((ROOT / "modules" / "__init__.py").read_text())
    if place != "absent":
        (theirs / "kernels").mkdir(parents=True)
        (theirs / "kernels" / "__init__.py").write_text(THEIR_KERNELS)
        _write_version(theirs)
    paths = [theirs, ours] if place == "before" else [ours, theirs]
    present = place != "absent"
    code = PROBE.format(order=order, mark="theirs" if present else None, present=present, root=str(ours))
    environment = {
        "PYTHONPATH": ":".join(map(str, paths)),
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("fine"), done.stderr


def _write_version(site: Path) -> None:
    """A version in the range that the installed transformers accepts, so that it does import the package."""
    from packaging.requirements import Requirement
    from transformers.dependency_versions_table import deps

    version = next(part.version for part in Requirement(deps["kernels"]).specifier if part.operator == ">=")
    (site / f"kernels-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (site / f"kernels-{version}.dist-info" / "METADATA").write_text(metadata)
