"""The contract that every module keeps, over all methods: a method is a stem, its case a file in contract_cases/."""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from checkpoints.load import backbone_of, known_methods, load_adapter
from checkpoints.manifest import CONFIG_FILE, TENSORS_FILE, read_manifest
from tests.contract_cases.interface import ContractCase
from trainers.base import FrozenBackboneTask, NonFiniteLoss, state_hash
from trainers.run_folder import RunFolder
from trainers.training import build_task, restore, train


class Trained:
    """A method's case, its task after training, and the adapter that it exported."""

    def __init__(self, method: str, folder: Path) -> None:
        (folder / "backbone").mkdir(parents=True)
        (folder / "run").mkdir()
        self.case: ContractCase = importlib.import_module(f"tests.contract_cases.{method}").case(folder / "backbone")
        self.task: FrozenBackboneTask = build_task(self.case.recipe)
        self.before = {name: value.clone() for name, value in self.task.learned.state_dict().items()}
        self.frozen, self.told = state_hash(self.task.backbone), io.StringIO()
        train(self.task, RunFolder(folder / "run"), Console(file=self.told, width=200))
        self.adapter = folder / "adapter"
        self.task.export_adapter(self.adapter)

    def load(self, target: Any) -> Any:
        """The exported adapter, attached."""
        return load_adapter(target, self.adapter)


@pytest.fixture(scope="module", params=known_methods())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(method: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(method, tmp_path_factory.mktemp(method))


def test_every_method_has_a_case_and_every_case_a_method() -> None:
    stems = {path.stem for path in (Path(__file__).parent / "contract_cases").glob("[a-z]*.py")} - {"interface"}
    assert stems == set(known_methods())


def attributes(target: Any) -> dict[str, Any]:
    """Names of all attributes of all parts, and the identity of what a pipeline is made of."""
    model = backbone_of(target)
    found: dict[str, Any] = {name: sorted(vars(part)) for name, part in model.named_modules()}
    found |= {f"{name} hooks": (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    for name, component in getattr(target, "components", {}).items():
        found[f"component {name}"] = id(component)
        if not isinstance(component, nn.Module) and name == "scheduler":
            found["scheduler attributes"] = sorted(k for k, v in vars(component).items() if callable(v))
    return found


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_1_detached_is_as_if_never_attached(trained: Trained) -> None:
    case, target = trained.case, trained.case.target()
    want = case.outputs(target, None)
    before, bits = attributes(target), state_hash(backbone_of(target))
    handle = trained.load(target)
    assert not same(case.outputs(target, handle), want)
    handle.detach()
    assert attributes(target) == before and state_hash(backbone_of(target)) == bits
    assert same(case.outputs(target, None), want)


def test_2_neutral_is_the_backbone(trained: Trained) -> None:
    case, target = trained.case, trained.case.target()
    with trained.load(target) as handle:
        want = (case.baseline or case.outputs)(case.target(), handle if case.baseline else None)
        case.make_neutral(handle)
        got = case.outputs(target, handle)
    if case.neutral_bound:
        torch.testing.assert_close(got, want, rtol=case.neutral_bound, atol=case.neutral_bound)
    else:
        assert same(got, want)


def test_3_training_moves_all_that_learns_and_no_bit_of_the_backbone(trained: Trained) -> None:
    after = trained.task.learned.state_dict()
    still = {name for name, value in after.items() if torch.equal(value, trained.before[name])}
    assert still == set(trained.case.still)
    assert state_hash(trained.task.backbone) == trained.frozen
    table = trained.task.parameter_table()
    assert all(row["part"] in trained.told.getvalue() for row in table)
    assert read_manifest(trained.adapter).trained == table
    assert {row["state"] for row in table} == {"trained", "frozen"}


def test_4_what_is_saved_loads_bit_for_bit_and_runs_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was opened")

    case = trained.case
    first, second = case.target(), case.target()
    with trained.load(first) as handle:
        want = case.outputs(first, handle)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    handle = trained.load(second)
    monkeypatch.undo()
    assert same(case.outputs(second, handle), want)
    assert {path.name for path in trained.adapter.iterdir()} == {CONFIG_FILE, TENSORS_FILE, "README.md"}
    trained.task.export_adapter(tmp_path / "again")
    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (trained.adapter / name).read_bytes()


def test_5_work_saved_is_counted(trained: Trained) -> None:
    case, target = trained.case, trained.case.target()
    everything = case.work(target, None)
    with trained.load(target) as handle:
        assert 0 < case.work(target, handle) < everything
    assert case.work(target, None) == everything


def test_6_what_it_was_not_made_for_is_refused_in_one_sentence(trained: Trained) -> None:
    assert trained.case.misfits
    for words, attempt in trained.case.misfits.items():
        with pytest.raises(ValueError, match=".") as caught:
            attempt(trained.load)
        message = str(caught.value)
        assert words in message and "\n" not in message and not message.endswith(".")


def test_7_the_exported_adapter_is_the_training_graph(trained: Trained) -> None:
    case, target = trained.case, trained.case.target()
    with trained.load(target) as handle:
        got = case.outputs(target, handle)
    torch.testing.assert_close(got, case.graph_outputs(trained.task), rtol=case.bound, atol=case.bound)


def test_8_the_first_loss_that_is_not_finite_stops(
    method: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trained.case.recipe
    last = recipe.trainer.save_every
    assert last < recipe.trainer.max_steps, "the recipe must save before its last update"
    task, run = build_task(recipe), RunFolder(tmp_path)
    step = task.training_step

    def poisoned(batch: Any, batch_idx: int) -> Tensor:
        return step(batch, batch_idx) * (float("nan") if task.global_step == last else 1.0)

    monkeypatch.setattr(task, "training_step", poisoned)
    with pytest.raises(NonFiniteLoss, match=rf"step {last}, batch {last}"):
        train(task, run)
    assert run.latest_checkpoint() is not None
    again = build_task(recipe)
    restore(again, run.latest_checkpoint())
    assert again.steps_done == last
    assert all(bool(torch.isfinite(value).all()) for value in again.state_dict().values())
