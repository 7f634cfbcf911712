"""Adapter folders: what is written comes back bit for bit; what is damaged or foreign is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from afterburner import load_adapter
from checkpoints import load as load_module
from checkpoints.card import card
from checkpoints.load import read_manifest, read_tensors
from checkpoints.manifest import Manifest, aside_of
from checkpoints.save import _swap, replace_card, write_adapter
from tests.adapters import Backbone, manifest_for, refusal

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture
def backbone() -> Backbone:
    return Backbone()


@pytest.fixture
def manifest(backbone: Backbone) -> Manifest:
    return manifest_for(backbone)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"t.{i}": (8 * torch.randn(3, i + 1)).to(dtype) for i, dtype in enumerate(DTYPES)}


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> Path:
    write_adapter(tmp_path / "adapter", manifest, tensors, card(manifest))
    return tmp_path / "adapter"


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A method called `fake`, whose attach remembers what it was given."""
    module = types.ModuleType("modules.fake")
    module.attach = lambda *given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules.fake", module)
    monkeypatch.setattr(load_module, "known_methods", lambda: ["fake", "other"])
    return module


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_what_is_written_comes_back_bit_for_bit(folder, manifest, tensors):
    got = read_tensors(folder)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in tensors)
    assert replace(read_manifest(folder), tensors={}, tensors_sha256="") == manifest


def test_equal_adapters_are_equal_files(folder, manifest, tensors, tmp_path):
    write_adapter(tmp_path / "again", manifest, dict(reversed(tensors.items())), card(manifest))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    text = (folder / "adapter_config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text)) and "peft_type" not in text


def test_rewriting_replaces_the_whole_folder_and_leaves_nothing_beside_it(folder, manifest, tensors):
    (folder / "report.json").write_text("about the older tensors")
    (folder.parent / ".adapter.dead.new").mkdir()  # of a writer that was killed
    write_adapter(folder, manifest, {"only": torch.ones(2)}, "card")
    assert set(read_tensors(folder)) == {"only"} and not (folder / "report.json").exists()
    assert os.listdir(folder.parent) == ["adapter"]
    replace_card(folder, "new card")
    assert (folder / "README.md").read_text() == "new card" and len(os.listdir(folder)) == 3


def test_a_folder_that_is_no_adapter_is_never_replaced(tmp_path, manifest):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    assert "is no adapter folder" in refusal(write_adapter, tmp_path / "home", manifest, {"a": torch.ones(1)}, "")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_without_atomic_exchange_a_killed_write_leaves_the_older_adapter(folder, manifest, monkeypatch, tmp_path):
    monkeypatch.setattr("checkpoints.save._exchange", lambda a, b: False)
    older = read_tensors(folder)
    building = tmp_path / "building"
    shutil.copytree(folder, building)
    monkeypatch.setattr(Path, "rename", _second_rename_fails(Path.rename))
    with pytest.raises(KeyboardInterrupt):
        _swap(building, folder)
    monkeypatch.undo()
    assert not folder.exists() and aside_of(folder).is_dir()
    assert read_tensors(folder).keys() == older.keys()
    monkeypatch.setattr("checkpoints.save._exchange", lambda a, b: False)
    write_adapter(folder, manifest, {"new": torch.ones(1)}, "")
    assert set(read_tensors(folder)) == {"new"} and not aside_of(folder).exists()


def _second_rename_fails(rename):
    calls = []

    def renamed(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    return renamed


WRITER = """
import sys, torch
from checkpoints.manifest import Manifest
from checkpoints.save import write_adapter
manifest = Manifest(method="fake", module={}, base_model_name_or_path="x", base_model_fingerprint="sha256:0")
print("ready", flush=True)
for i in range(10**9):
    tensors = {name: torch.full((300, 1000), float(i)) for name in "abc"}
    write_adapter(sys.argv[1], manifest, tensors, f"card {i}")
"""


def test_sigkill_at_any_moment_leaves_one_whole_adapter(tmp_path):
    target, seen = tmp_path / "adapter", set()
    chance = random.Random(0)
    for kill in range(60):
        if kill >= 6 and len(seen) > 1:  # a slow machine replaces nothing in so short a time
            break
        writer = subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert writer.stdout.readline() == "ready\n"
        while not target.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.15 + 0.02 * kill))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        values = {float(value) for tensor in read_tensors(target).values() for value in tensor.unique()}
        assert len(values) == 1
        assert (target / "README.md").read_text() == f"card {int(*values)}"
        seen |= values
    assert len(os.listdir(tmp_path)) <= 2  # the adapter, and at most what the last writer was killed over
    assert len(seen) > 1, "every writer was killed before it replaced anything"


def test_a_full_disk_is_one_sentence_and_leaves_the_older_adapter(folder, manifest, tensors):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message = refusal(write_adapter, folder, manifest, {"large": torch.zeros(100_000)}, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in message and "untouched" in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["adapter"]


def test_tensors_that_are_not_finite_are_neither_written_nor_read(folder, manifest):
    bad = {"a": torch.tensor([1.0, float("nan")])}
    assert "tensor a" in refusal(write_adapter, folder, manifest, bad, "")
    edit_tensors(folder, save(bad))
    edit_config(folder, tensors={"a": {"dtype": "float32", "shape": [2]}})
    assert "values in a that are not finite" in refusal(read_tensors, folder)


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "last.ckpt", "adapter_model.safetensors"])
def test_a_pickle_is_never_opened(folder, tmp_path, name):
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    message = refusal(read_tensors, folder)
    assert name in message
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "truncated"),
        (lambda data: data[:7], "truncated"),
        (lambda data: data[:100], "truncated"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: (17 * 1024**2).to_bytes(8, "little") + data[8:], "header of 17,825,792 bytes"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "header of"),
        (lambda data: data[:8] + b"[" + data[9:], "damaged header"),
        (lambda data: data[:8] + b"\xff" * 16 + data[24:], "damaged header"),
        (lambda data: data.replace(b'"I64"', b'"I6?"'), "I6?"),
        (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'), "damaged"),
        (lambda data: data + b"x", "damaged"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not the file"),
    ],
)
def test_damaged_tensor_files_are_refused(folder, damage, words):
    edit_tensors(folder, damage((folder / "adapter_model.safetensors").read_bytes()))
    assert words in refusal(read_tensors, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"t.0": t["t.0"].half()}), "t.0 as torch.float16, not torch.float32"),
        (lambda t: t.update({"t.0": t["t.0"][:2].clone()}), "t.0 of shape (2, 1), not (3, 1)"),
        (lambda t: t.pop("t.1"), "lacks the tensors ['t.1']"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown ones ['extra']"),
    ],
)
def test_other_tensors_than_the_manifest_lists_are_refused(folder, tensors, change, words):
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    change(tensors)
    edit_tensors(folder, save(tensors))
    assert words in refusal(read_tensors, folder)
    assert words in refusal(read_tensors, folder, expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds a list"),
        ('{"peft_type": "LORA"}', "PEFT adapter (LORA)"),
        ('{"format": 2}', "format 2 but this version reads up to 1"),
        ('{"format": "1"}', "format '1'"),
        ('{"format": 1, "method": "fake", "colour": 1}', "lacks the fields ['base_model_fingerprint', "),
    ],
)
def test_manifests_that_are_damaged_foreign_or_newer_are_refused(folder, content, words):
    (folder / "adapter_config.json").write_text(content)
    assert words in refusal(read_manifest, folder)


def test_a_manifest_with_a_field_of_another_type_is_refused(folder):
    edit_config(folder, module=3)
    assert "module of type int" in refusal(read_manifest, folder)


@pytest.mark.parametrize("name", ["nope", "contracts", "../fake", "os", "fake.x", ""])
def test_an_unknown_method_is_refused_with_the_known_ones_and_imports_nothing(folder, backbone, method, name):
    edit_config(folder, method=name)
    before = set(sys.modules)
    message = refusal(load_adapter, backbone, folder)
    assert f"{name!r}, which is not one of fake, other" in message
    assert set(sys.modules) == before


def test_methods_are_the_stems_that_modules_and_trainers_share(monkeypatch, tmp_path):
    for name in ("modules/a.py", "modules/contracts.py", "modules/b/__init__.py", "trainers/a.py", "trainers/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(load_module, "_ROOT", tmp_path)
    assert load_module.known_methods() == ["a", "b"]


def test_load_adapter_refuses_another_backbone_before_it_attaches(folder, method):
    method.attach = None
    assert "num_layers 3 (here 4)" in refusal(load_adapter, Backbone(num_layers=4), folder)


def test_load_adapter_attaches_to_pipeline_or_model(folder, backbone, method, manifest, tensors):
    for target in (backbone, types.SimpleNamespace(transformer=backbone, scheduler=None)):
        given, found, learned = load_adapter(target, str(folder))
        assert given is target and found.module == manifest.module and learned.keys() == tensors.keys()
    assert "not to a list" in refusal(load_adapter, [], folder)


def test_what_a_module_cannot_load_is_one_sentence(folder, backbone, method):
    method.attach = lambda target, manifest, tensors: nn.Linear(2, 2).load_state_dict(tensors)
    assert "does not fit" in refusal(load_adapter, backbone, folder)


def test_a_missing_folder_is_said_and_a_path_is_never_taken_for_a_hub_id(tmp_path, backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    for adapter in (tmp_path / "a", str(tmp_path / "a"), "./a/b", "outputs/a/000/adapter"):
        assert "no adapter folder" in refusal(load_adapter, backbone, adapter)


def test_a_hub_id_fetches_data_files_only(folder, backbone, method, monkeypatch):
    asked, commit = {}, "0" * 40

    def snapshot_download(repo, **how):
        asked.update(how, repo=repo)
        if repo == "you/absent":
            raise OSError("no room\nleft")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_adapter(backbone, "you/fake", revision=commit)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.json"}
    assert (asked["repo"], asked["revision"], set(asked["allow_patterns"])) == ("you/fake", commit, files)
    assert "cannot be fetched: no room" in refusal(load_adapter, backbone, "you/absent", revision=commit)


def test_the_card_says_unmeasured_until_there_is_a_report(manifest):
    assert "Unmeasured" in card(manifest) and "base_model:" not in card(manifest)
    row = {"name": "fake", "kind": "adapter", "speedup": 1.7, "speedup_range": [1.6, 1.8], "latency_s": 0.25}
    row |= {"work": {"blocks": 80}, "quality": {"ssim": 0.9}}
    report = {
        "device": "cpu",
        "commit": "abc",
        "seed": 0,
        "rows": [row],
    }
    text = card(replace(manifest, base_model_name_or_path="you/model"), report, "It loses.")
    assert "| fake | adapter | 1.70x | 1.60 to 1.80 | 250.0 | 80 | 0.9 |" in text and "It loses." in text
    assert text.startswith("---\n") and "\nbase_model: you/model\n" in text and "Unmeasured" not in text
