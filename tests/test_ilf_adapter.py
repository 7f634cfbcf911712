"""ILF's adapter: the same latents in a fresh process, as in training; small; refused where it does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from checkpoints.load import load_adapter
from checkpoints.manifest import AdapterError, read_manifest
from checkpoints.save import write_adapter
from data.inputs import training_inputs
from data.stepped import derive_seed
from modules.embedded import EMBEDDED_FOLDER
from modules.ilf import ILFConfig, ILFModule, centred_span
from modules.pipelines import driver, load_pipeline
from modules.solvers import SolverTable
from tests.tiny import tiny_pipeline, tiny_transformer
from tests.tiny_ilf import (
    CALL,
    DEPTH,
    INPUTS,
    LEARNED_SOLVER,
    SEEDS,
    driver_of,
    ilf_config,
    latents_of_call,
    manifest_of,
    noisy_module,
    save_tiny,
    solver_entry,
    tensors_of,
    tiny_recipe,
)
from trainers import diffusion_cases
from trainers.config import EvaluateConfig
from trainers.diffusion_cases import Probe
from trainers.ilf import evaluation_setup
from trainers.ilf.task import ILFTask
from trainers.recipes import compose_recipe
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

ROOT = Path(__file__).resolve().parents[1]


def trained(name: str, folder: Path, **changes: str) -> ILFTask:
    """A task after a few updates, with strengths that show, and its adapter in `folder`."""
    task = build_task(tiny_recipe(name, **changes))
    (folder.parent / "run").mkdir()
    train(task, RunFolder(folder.parent / "run"))
    with torch.no_grad():
        task.learned.loop.scale.add_(0.1)
    task.export_adapter(folder)
    return task


# The exported adapter equals the training graph.
@pytest.mark.parametrize("solver", ["learned", "dpm", "ddim"])
@pytest.mark.parametrize("inner", ["outer", "target"])
def test_the_pipeline_with_the_adapter_ends_where_the_rollout_does(
    kind: str, solver: str, inner: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny(kind, saved, monkeypatch)
    changes = {"objective.rollout": "true", "module.solver": solver, "module.inner_timestep": inner}
    task = trained(name, tmp_path / "adapter", **changes)
    data = task.recipe.data
    inputs = training_inputs(name, data.prompts, task.recipe.seed, data.trajectories)
    seeds = [derive_seed(task.recipe.seed, "trajectory", i) for i in range(len(inputs))]
    graph = task.rollout.final(task.learned, task.loop, task.runs)
    fresh = driver(load_pipeline(name), name)
    with load_adapter(fresh.pipe, tmp_path / "adapter") as handle:
        got = latents_of_call(fresh, inputs, seeds, **handle.call_kwargs)
    torch.testing.assert_close(got, graph, rtol=1e-4, atol=1e-4)


def test_learned_rows_are_in_the_manifest_to_the_last_digit(
    kind: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny(kind, saved, monkeypatch)
    task = trained(name, tmp_path / "adapter", **LEARNED_SOLVER)
    rows = task.learned.rows
    assert (rows.state.detach() != torch.tensor(rows.fixed.state)).any()
    entry = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["module"]
    assert SolverTable(**entry["solver"]) == rows.table()
    assert torch.equal(torch.tensor(entry["solver"]["data"]), rows.data.detach())
    assert ILFConfig(**entry) == task.config_now() and entry["timesteps"] == entry["solver"]["timesteps"]
    with load_adapter(load_pipeline(name), tmp_path / "adapter") as handle:
        assert handle._pipe.scheduler.table == rows.table()
    manifest = read_manifest(tmp_path / "adapter")
    assert manifest.call == CALL[kind] | ({"clean_caption": False} if kind == "pixart" else {})
    assert [row["state"] for row in manifest.trained] == ["trained", "trained", "frozen"]
    assert manifest.made_by["steps"] == 4 and (tmp_path / "adapter" / "README.md").is_file()


# Property 10.

FRESH = """
import sys, torch
from pathlib import Path
from afterburner import load_adapter
from modules.pipelines import load_pipeline
from tests.tiny_ilf import INPUTS, SEEDS, driver_of, latents_of_call
torch.set_num_threads(1)
for kind in ("pixart", "dit"):
    folder = Path(sys.argv[1])
    running = driver_of(load_pipeline(str(folder / f"tiny_{kind}")), kind)
    handle = load_adapter(running.pipe, folder / f"adapter_{kind}")
    torch.save(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), folder / f"{kind}.pt")
"""


def test_a_fresh_process_draws_the_same_latents(saved: Path) -> None:
    want = {}
    torch.set_num_threads(1)
    for kind in ("pixart", "dit"):
        running = driver_of(load_pipeline(save_tiny(kind, saved)), kind)
        entry = solver_entry(running.pipe, 4)
        config = ilf_config(running.pipe, inner_timestep="target", scale_shape="per_step", solver=entry)
        module = noisy_module(config, running.transformer)
        write_adapter(
            saved / f"adapter_{kind}", manifest_of(module, running.transformer), tensors_of(module), "A card."
        )
        with load_adapter(running.pipe, saved / f"adapter_{kind}") as handle:
            want[kind] = latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(torch.load(saved / f"{kind}.pt"), latents) for kind, latents in want.items())


def test_another_depth_or_width_is_refused_naming_both(kind: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(kind)
    module = noisy_module(ilf_config(pipe), pipe.transformer)
    write_adapter(tmp_path / "a", manifest_of(module, pipe.transformer), tensors_of(module), "A card.")
    narrow: dict[str, Any] = {**pipe.transformer.config, "attention_head_dim": 4}
    if kind == "pixart":
        narrow["cross_attention_dim"] = 8
    classes = {"pixart": PixArtTransformer2DModel, "dit": DiTTransformer2DModel}
    others = [
        (tiny_transformer(kind, layers=6), "num_layers 4 (here 6)"),
        (classes[kind](**narrow), "attention_head_dim 8 (here 4)"),
        (tiny_transformer(kind, seed=1), "fingerprint"),
    ]
    for other, words in others:
        pipe.register_modules(transformer=other)
        with pytest.raises(AdapterError) as caught:
            load_adapter(pipe, tmp_path / "a")
        assert words in str(caught.value) and "\n" not in str(caught.value)
    pipe.register_modules(transformer=tiny_transformer(kind).bfloat16())
    with pytest.raises(AdapterError, match="dtype 'float32' but dtype is 'bfloat16'"):
        load_adapter(pipe, tmp_path / "a")


# Property 11.
def test_the_report_has_the_plain_sampler_at_as_many_blocks(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_BISECTIONS", 2), ("_INTERVALS", range(2, 4)), ("_WARMUPS", range(1, 3))):
        monkeypatch.setattr(diffusion_cases, name, value)
    name = save_tiny("dit", saved)
    running = driver(load_pipeline(name), name)
    module = noisy_module(ilf_config(running.pipe, solver=solver_entry(running.pipe, 4)), running.transformer)
    write_adapter(tmp_path / "a", manifest_of(module, running.transformer, name), tensors_of(module), "A card.")
    config = EvaluateConfig(adapter=str(tmp_path / "a"), evaluation={"inputs": 2, "timing_batch": 2})
    setup = evaluation_setup(running, tmp_path / "a", config)
    probe = Probe(driver=running, inputs=setup.inputs, seeds=setup.seeds, reference=setup.reference)
    kinds = [case.kind for case in setup.cases]
    assert kinds[:3] == ["baseline", "adapter", "peer"] and kinds.count("baseline") == kinds.count("adapter") == 1
    blocks = {case.name: probe.run(case)[0] for case in setup.cases}
    own = blocks["ILF, 4 steps"]
    assert own == module.config.blocks(DEPTH) == 25 and blocks["20 steps"] == 20 * DEPTH
    assert blocks["its solver without the loop, 4 steps"] == 4 * DEPTH
    plain = sorted(blocks[case.name] for case in setup.cases if case.kind == "plain")
    # One below, and the fewest steps that have no fewer blocks, and one more.
    assert plain == [6 * DEPTH, 7 * DEPTH, 8 * DEPTH] and plain[0] < own <= plain[1] < own + DEPTH
    assert all(blocks[case.name] >= own for case in setup.cases if case.kind == "untrained")
    assert setup.reference.shape == (2, 3, 16, 16) and "50 steps of DDIMScheduler" in setup.reference_text


# Sizes.


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_the_embedded_adapters_are_a_small_part_of_their_backbone(name: str) -> None:
    if not (EMBEDDED_FOLDER / name / "model_index.json").is_file():
        pytest.skip(f"embedded:{name} is not shipped")
    transformer = load_pipeline(f"embedded:{name}").transformer
    settings = compose_recipe(f"ilf_{name}").module
    config = ILFConfig(
        span_start=centred_span(len(transformer.transformer_blocks), settings.span_len),
        span_len=settings.span_len,
        feedback=[True] * settings.steps,
        timesteps=list(range(settings.steps, 0, -1)),
        guidance=settings.guidance,
        scale_shape=settings.scale_shape,
    )
    module = ILFModule(config, transformer)
    mine, theirs = (sum(p.numel() for p in part.parameters()) for part in (module, transformer))
    assert mine <= 0.15 * theirs


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_a_checkpoint_is_at_most_four_adapters(ema: str, tmp_path: Path) -> None:
    wide = {**tiny_transformer("dit").config, "num_layers": 2, "attention_head_dim": 64}
    pipe = tiny_pipeline("dit")
    pipe.register_modules(transformer=DiTTransformer2DModel(**wide))
    name = str(tmp_path / "tiny_dit")
    pipe.save_pretrained(name)
    trained(name, tmp_path / "adapter", **LEARNED_SOLVER, trainer__ema=ema)
    adapter = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert adapter > 1e6
    # Weights, two moments and the average are four copies already: with one, the file's own records come on top.
    records = 64 * 1024 if float(ema) else 0
    assert RunFolder(tmp_path / "run").latest_checkpoint().stat().st_size <= 4 * adapter + records


def test_the_module_entry_is_all_that_is_needed_to_build_it_again() -> None:
    pipe = tiny_pipeline("dit")
    config = ilf_config(pipe, solver=solver_entry(pipe, 4), call={"a": 1})
    assert ILFConfig(**json.loads(json.dumps(asdict(config)))) == config
