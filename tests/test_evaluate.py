"""The evaluate command: refusals in one sentence with their exit codes, and a whole evaluation of a tiny adapter."""

import json
import types

import pytest
import torch
from torch import nn

import modules.pipelines
from checkpoints.manifest import Manifest, fingerprint, read_manifest
from checkpoints.save import write_adapter
from modules.contracts import Handle
from modules.pipelines import DiTDriver
from tests.tiny import tiny_dit, tiny_dit_pipeline
from trainers import evaluate, evaluation
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import adapter_case, plain_case, reference_images
from trainers.publish import own_report
from trainers.recipes import exit_on_error


class HalfSteps(Handle):
    """An adapter that runs a block of its own once and half of the steps."""

    def __init__(self, driver, block):
        super().__init__()
        self.call_kwargs = {"num_inference_steps": 3, "guidance_scale": 1.5}
        self.block = block
        self.hook = driver.transformer.register_forward_hook(self._run_block)

    def _run_block(self, module, args, output):
        self.block(torch.zeros(1, 16, 16), timestep=torch.zeros(1, dtype=torch.long), class_labels=torch.tensor([1]))

    def detach(self):
        self.hook.remove()


def evaluation_setup(driver, adapter, config):
    inputs, seeds = [1, 2, 3], [5, 6, 7]
    block = tiny_dit(1).transformer_blocks[0]
    reference = reference_images(driver, inputs, seeds, 6, 2)
    adapter = adapter_case("half", lambda: HalfSteps(driver, block), lambda handle: [handle.block])
    cases = [plain_case(6, kind="baseline"), adapter, plain_case(4)]
    return evaluation.EvaluationSetup(
        cases=cases,
        inputs=inputs,
        seeds=seeds,
        reference=reference,
        reference_text="6 plain steps",
        quality={**evaluation.IMAGE_QUALITY, "accuracy": lambda images, reference, inputs: 1.0},
        timing_batch=2,
    )


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    pipe = tiny_dit_pipeline(2)
    manifest = Manifest(
        method="half",
        module={},
        base_model_name_or_path="tiny",
        base_model_fingerprint=fingerprint(pipe.transformer),
        made_by={"seed": 4},
    )
    folder = tmp_path / "run" / "adapter"
    write_adapter(folder, manifest, {"weight": torch.ones(2)}, "a card")
    monkeypatch.setattr(evaluation, "method_module", lambda _: types.SimpleNamespace(evaluation_setup=evaluation_setup))
    monkeypatch.setattr(modules.pipelines, "load_pipeline", lambda name, revision, dtype: pipe)
    monkeypatch.setattr(modules.pipelines, "driver", lambda pipe, name: DiTDriver(pipe, {"guidance_scale": 1.5}))
    return folder


def config(adapter, **changed):
    return EvaluateConfig(adapter=str(adapter), device="cpu", **changed)


def test_evaluation_writes_report_and_card(adapter, tmp_path, capsys):
    (tmp_path / "run" / "provenance.json").write_text("{}")
    report = evaluate.run(config(adapter))
    rows = {row["name"]: row for row in report["rows"]}
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert rows["half"]["work"]["blocks"] == 3 * (2 + 1) and rows["6 steps"]["work"]["blocks"] == 12
    assert set(rows["half"]["quality"]) == {"psnr_db", "mse", "ssim", "accuracy"}
    assert (report["adapter_seed"], report["inputs"], report["timing_batch"]) == (4, 3, 2)
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert own_report(adapter, read_manifest(adapter), files, unmeasured=False) == report  # may be published
    assert (tmp_path / "run" / "samples" / "grid.png").is_file()
    card = (adapter / "README.md").read_text()
    assert "half" in card and "6 steps" in card and card != "a card"
    assert (adapter / "report.json").read_bytes() == (tmp_path / "run" / "report.json").read_bytes()
    assert read_manifest(adapter).method == "half"
    assert "half" in capsys.readouterr().out


def test_output_can_be_named_and_else_is_outputs_evaluate(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate._output_folder(config(adapter, output="there"), adapter) == evaluate.Path("there")
    assert evaluate._output_folder(config(adapter), adapter) == evaluate.Path("outputs/evaluate/adapter")


def run_command(*argv):
    return exit_on_error(lambda: evaluate.main(argv))


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["adpter=x"], 2, "the nearest key is adapter"),
        (["adapter=x", "evaluation.repeats=2"], 2, "expected an integer >= 5"),
        (["adapter=./no/where"], 1, "there is no adapter folder"),
    ],
)
def test_refusals_are_one_line_per_problem(argv, code, words, capsys):
    assert run_command(*argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert any(words in line for line in lines) and all(line.startswith("error: ") for line in lines)


def test_an_adapter_of_an_unknown_method_is_refused(tmp_path, capsys):
    manifest = Manifest(method="os", module={}, base_model_name_or_path="x", base_model_fingerprint="sha256:0")
    write_adapter(tmp_path / "a", manifest, {"weight": torch.ones(1)}, "")
    assert run_command(f"adapter={tmp_path / 'a'}") == 1
    assert "method is 'os', which is not one of" in capsys.readouterr().err


def test_a_damaged_adapter_is_refused(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{")
    assert run_command(f"adapter={tmp_path}") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_device_that_is_not_there_is_refused(adapter, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_command(f"adapter={adapter}", "device=cuda") == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_backbone_that_cannot_be_loaded_is_refused(adapter, monkeypatch, capsys):
    def offline(name, revision, dtype):
        raise OSError(f"{name} is not\n  in the cache")

    monkeypatch.setattr(modules.pipelines, "load_pipeline", offline)
    assert run_command(f"adapter={adapter}") == 1
    assert capsys.readouterr().err.splitlines() == ["error: tiny is not in the cache"]


def test_adapter_case_forgets_its_handle():
    class Plain(Handle):
        def detach(self):
            self.gone = True

    handles = []

    def attach():
        handles.append(Plain())
        return handles[-1]

    case = adapter_case("a", attach, lambda handle: [nn.Identity()] if handle is handles[-1] else [])
    for _ in range(2):
        with case.enter() as call:
            assert call == {} and len(list(case.counted())) == 1
    assert len(handles) == 2 and all(handle.gone for handle in handles)
