"""Medusa by its commands: train, export for engines, load in another process, measure against the rivals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.load import load_adapter
from modules.decode_host import attach_drafter
from modules.language_models import load_model
from tests.tiny_decode import TREES, Random
from tests.tiny_language import tiny_llama
from tests.tiny_medusa import RECIPE, save_tiny
from trainers import evaluate, export, fit
from trainers.config import EvaluateConfig, Evaluation
from trainers.language_cases import LanguageCase, compiled_case, measure_language_cases
from trainers.medusa.layouts import R_FILE, V_FILE
from trainers.medusa.prompts import Prompt

ROOT = Path(__file__).resolve().parents[1]
FRESH = """
import sys, torch
from checkpoints.load import load_adapter
from modules.language_models import load_model
from trainers.medusa.calibration import greedy_texts
model, tokenizer = load_model(sys.argv[1])
handle = load_adapter(model, sys.argv[2])
prompts = [tokenizer(prompt).input_ids for prompt in sys.argv[3:]]
greedy_texts(model, prompts, new_tokens=24, batch_size=1, pad=tokenizer.pad_token_id)
print(handle.counts.tokens_per_step)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("medusa")
    name = save_tiny(folder)
    settings = [f"backbone.name={name}", f"data.path={folder / 'text.jsonl'}", f"output_dir={folder / 'out'}"]
    more = ["trainer.max_steps=20", "trainer.sample_every=10", "trainer.log_every=10", "evaluate=false", "run=one"]
    assert fit.main([f"recipe={RECIPE}", *settings, *more]) == 0
    return folder / "out" / "medusa_tiny" / "one"


def test_metrics_have_every_heads_accuracy_and_the_tokens_per_step(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert {"accuracy_1", "accuracy_2", "loss_1", "loss_2"} <= row.keys()
    assert 1 <= float(row["tokens_per_step"]) <= 3


def test_a_fresh_process_accepts_as_much_as_this_one(run: Path) -> None:
    name = str(run.parents[2] / "llama")
    words = ["cafe", "decade", "abacad"]
    command = [sys.executable, "-W", "ignore", "-c", FRESH, name, str(run / "adapter"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_model(name)
    plain = [model.generate(**tokenizer(w, return_tensors="pt"), max_new_tokens=24, do_sample=False) for w in words]
    with load_adapter(model, run / "adapter") as handle:
        fast = [model.generate(**tokenizer(w, return_tensors="pt"), max_new_tokens=24, do_sample=False) for w in words]
        assert float(done.stdout.split()[-1]) == pytest.approx(handle.counts.tokens_per_step, rel=0.01)
        assert handle.counts.tokens_per_step > 1
    assert all(torch.equal(one, other) for one, other in zip(plain, fast, strict=True))


def test_engines_folders_are_written_from_a_run_and_an_unknown_one_is_refused(run: Path, capsys: Any) -> None:
    for name, file in (("tgi", R_FILE), ("vllm", V_FILE)):
        assert export.main([f"run={run}", f"format={name}"]) == 0
        assert {path.name for path in (run / name).iterdir()} == {file, "config.json", "README.md"}
        assert export.main([f"run={run}", f"format={name}", f"output={run / 'adapter'}"]) == 1
        assert f"is no {name} folder, so it is not replaced" in capsys.readouterr().err
    assert export.main([f"run={run}", "format=onnx"]) == 1
    assert "format is 'onnx', which is not one of adapter, tgi, vllm (medusa)" in capsys.readouterr().err


def test_an_adapter_holds_heads_and_nothing_of_the_backbone(run: Path) -> None:
    manifest = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert all(name.startswith("heads.") for name in manifest["tensors"])
    entry = manifest["module"]
    assert len(entry["hits"]) == len(entry["counts"]) == 2 and all(len(row) == 4 for row in entry["hits"])
    assert 1 <= len(entry["tree"]) <= 6
    card = (run / "adapter" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "library_name: afterburner" in card and "vLLM" in card


def test_evaluation_compares_with_every_rival_by_category(run: Path, tmp_path: Path) -> None:
    text = str(run.parents[2] / "text.jsonl")
    settings = Evaluation(inputs=3, timing_batch=1, prompts=text, new_tokens=12)
    config = EvaluateConfig(adapter=str(run / "adapter"), device="cpu", output=str(tmp_path), evaluation=settings)
    report = evaluate.run(config)
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["kind"] for row in report["rows"]] == ["baseline", *["adapter"] * 3, *["untrained"] * 3]
    assert all(row["quality"]["exact_match"] == 1 for row in rows.values())
    plain, medusa = rows["plain decoding"], report["rows"][1]
    assert plain["work"]["tokens_per_step"] == 1 and plain["speedup"] == 1
    assert medusa["work"]["tokens_per_step"] >= 1
    assert medusa["work"]["overhead"] == pytest.approx(medusa["work"]["tokens_per_step"] / medusa["speedup"])
    assert report["measured_tokens_per_step"] == medusa["work"]["tokens_per_step"]
    assert report["expected_tokens_per_step"] >= 1 and report["verdict"]["metric"] == "speedup"
    assert report["categories"].keys() == {"all"} and report["categories"]["all"].keys() == rows.keys()
    assert 0 <= report["repeated_trigrams"]["all"] <= 1
    markdown = (tmp_path / "report.md").read_text()
    assert "Speedup and tokens per step by kind of input" in markdown and "plain decoding" in markdown
    assert "tok/step" in markdown and (tmp_path / "report.png").is_file()
    assert "tokens_per_step" in (run / "adapter" / "README.md").read_text()


def test_medusa_2_is_measured_against_the_original_backbone(run: Path, tmp_path: Path) -> None:
    name, text = str(run.parents[2] / "llama"), str(run.parents[2] / "text.jsonl")
    settings = [f"backbone.name={name}", f"data.path={text}", f"output_dir={tmp_path}", "run=two", "lora.rank=2"]
    more = ["lora.targets=[q_proj,down_proj]", "trainer.max_steps=5", "optimizer.lr=0.05"]
    sizes = ["evaluation.inputs=2", "evaluation.timing_batch=1", "evaluation.new_tokens=8"]
    assert fit.main([f"recipe={RECIPE}", *settings, *more, *sizes]) == 0
    report = json.loads((tmp_path / "medusa_tiny" / "two" / "report.json").read_text())
    baseline, medusa = report["rows"][:2]
    assert baseline["quality"]["perplexity"] != medusa["quality"]["perplexity"]
    assert medusa["quality"]["exact_match"] == 1 and "with its LoRA" in report["reference"]
    assert "perplexity" in (tmp_path / "medusa_tiny" / "two" / "adapter" / "README.md").read_text()


PLAIN = LanguageCase(name="plain decoding", kind="baseline", enter=lambda: nullcontext({}), one_by_one=True)


class Uncompilable:
    """A model on the CPU whose compiled call fails."""

    device = torch.device("cpu")

    def generate(self, **_: Any) -> torch.Tensor:
        raise RuntimeError("no C++\n compiler")


def test_what_does_not_compile_here_is_left_out_and_told() -> None:
    assert compiled_case(Uncompilable(), PLAIN, [Prompt((1, 2), "all")], 4, 0) == (None, "no C++ compiler")


def drafted(model: Any) -> LanguageCase:
    """Random trees, and how often they had the backbone called."""
    handles = []

    @contextmanager
    def enter() -> Iterator[dict[str, Any]]:
        with attach_drafter(model, Random(TREES["dense"])) as handle:
            handles.append(handle)
            yield {}

    def calls() -> int:
        return handles[-1].counts.generations + handles[-1].counts.steps

    return LanguageCase(name="trees", kind="adapter", enter=enter, calls=calls)


def test_calls_that_are_told_are_those_that_a_hook_counts() -> None:
    model, prompts = tiny_llama(), [Prompt((5, 9), "all"), Prompt((5, 9, 30), "all")]
    told, hooked = drafted(model), replace(PLAIN, name="plain, hooked", one_by_one=False)
    settings = Evaluation(new_tokens=12, timing_batch=1, inputs=2)
    cases = [PLAIN, told, replace(told, name="hooked", calls=None), hooked]
    rows = {row.name: row for row in measure_language_cases(model, cases, prompts, settings=settings, pad=1).rows}
    assert rows["hooked"].work["tokens_per_step"] == rows["trees"].work["tokens_per_step"]
    assert rows["plain, hooked"].work["tokens_per_step"] == rows["plain decoding"].work["tokens_per_step"] == 1
    assert all(row.quality["exact_match"] == 1 for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda _: PLAIN, drafted], ids=["plain", "trees"])
def test_a_compiled_step_says_the_same(make: Callable[[Any], LanguageCase]) -> None:
    model = tiny_llama()
    case, obstacle = compiled_case(model, make(model), [Prompt((5, 9), "all"), Prompt((5, 9, 30), "all")], 8, 1)
    assert case is not None and obstacle is None
    ids = torch.tensor([[5, 9, 30]])
    want = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with case.enter() as call:
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **call), want)
    assert (case.name, case.kind) in [("plain decoding, compiled", "plain"), ("trees, compiled", "adapter")]
