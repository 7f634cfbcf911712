"""`python -m trainers.submit`: the script that SLURM gets, what is refused, and that bash reads back what was typed."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from trainers import recipes, submit
from trainers.settings import ConfigError

RECIPE = "recipe=ilf_pixart"


def prepared(*words: str) -> submit.Submission:
    return submit.prepare(recipes.read_command_line(words, ("--help", "--print")))


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepared(*words)
    return caught.value.problems


def started(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """What bash gives to srun when it runs the script."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/srun").write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "bin/srun").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-s"], input=script, env={"PATH": path, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def options(script: str) -> dict[str, str]:
    words = [
        shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def test_the_script_asks_for_what_the_recipe_is_told_to_use(tmp_path: Path) -> None:
    job = prepared(RECIPE, "slurm.nodes=4", "slurm.gpus_per_node=8", "slurm.time=02:00:00", "slurm.cpus_per_task=6")
    asked, words = options(job.script), started(job.script, tmp_path)
    assert {
        "--requeue": "",
        "--open-mode": "append",
        "--signal": "USR1@120",
        "--time": "02:00:00",
    }.items() <= asked.items()
    assert {"--nodes": "4", "--ntasks-per-node": "8", "--gpus-per-node": "8"}.items() <= asked.items()
    assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=6"]
    typed = words[words.index("trainers.fit") + 1 :]
    recipe = recipes.compose_recipe("ilf_pixart", dict(word.split("=", 1) for word in typed[1:]))
    assert typed[0] == RECIPE and recipe == job.recipe
    assert (recipe.trainer.num_nodes, recipe.trainer.devices, recipe.trainer.accelerator) == (4, 8, "gpu")


def test_the_recipes_own_numbers_are_asked_for(tmp_path: Path) -> None:
    asked = options(prepared("recipe=ilf_pixart_alpha_512", "trainer.num_nodes=2").script)
    assert (asked["--nodes"], asked["--ntasks-per-node"], asked["--gpus-per-node"]) == ("2", "8", "8")
    cpu = options(prepared(RECIPE, "slurm.gpus_per_node=0", "trainer.devices=3").script)
    assert cpu["--ntasks-per-node"] == "3" and "--gpus-per-node" not in cpu


@pytest.mark.parametrize("value", ["a b", "it's", 'say "x"', "$HOME `id` \\", "a;b&c|d", "[1]", "100%", "é"])
def test_every_value_arrives_as_it_was_typed(value: str, tmp_path: Path) -> None:
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    job = prepared(RECIPE, f"output_dir={quoted}", "slurm.gpus_per_node=0", "seed=1,2")
    words = started(job.script, tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert f"output_dir={quoted}" in words and words[-1] == "seed=2"
    assert options(job.script)["--output"] == f"{str(job.logs).replace('%', '%%')}/%A_%a.log"


def test_a_sweep_is_every_combination_in_the_order_typed(tmp_path: Path) -> None:
    job = prepared(
        RECIPE,
        "seed=3,1",
        "evaluate=false",
        "optimizer.betas=[0.9,0.99]",
        'backbone.name="a,b",c',
        "slurm.max_parallel=2",
    )
    assert job.swept == [
        ["seed=3", 'backbone.name="a,b"'], ["seed=3", "backbone.name=c"],
        ["seed=1", 'backbone.name="a,b"'], ["seed=1", "backbone.name=c"],
    ]  # fmt: skip
    assert options(job.script)["--array"] == "0-3%2" and len(job.table) == 4
    for index, words in enumerate(job.swept):
        given = started(job.script, tmp_path, SLURM_ARRAY_TASK_ID=str(index))
        assert given[-2:] == words and "optimizer.betas=[0.9,0.99]" in given
    named = prepared(RECIPE, "seed=3,1", "run=mine")
    assert started(named.script, tmp_path, SLURM_ARRAY_TASK_ID="1")[-2:] == ["seed=1", "run=mine_1"]
    assert not any("run=mine" == word for word in started(named.script, tmp_path, SLURM_ARRAY_TASK_ID="1"))


def test_all_that_is_wrong_is_told_at_once() -> None:
    told = problems(
        RECIPE, "slurm.nodez=4", "trainer.max_stepz=3", "seed=x,1", "slurm.gpus_per_node=8", "trainer.devices=2", "word"
    )
    assert told == [
        "'word' is neither an option nor key=value",
        "unknown key slurm.nodez: the nearest key is slurm.nodes",
        "unknown key trainer.max_stepz: the nearest key is trainer.max_steps",
        "seed is 'x', expected an integer >= 0",
    ]
    told = problems(
        RECIPE, "slurm.gpus_per_node=8", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_stepz=3"
    )
    assert [line.partition(",")[0] for line in told] == [
        "slurm.gpus_per_node=8 means trainer.devices=8",
        "slurm.gpus_per_node=8 means trainer.accelerator=gpu",
        "unknown key trainer.max_stepz: the nearest key is trainer.max_steps",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm.time=2"], "time is 2 and the warning comes 120 s before"),
        (["slurm.time=soon"], "slurm.time is 'soon', expected minutes, MM:SS"),
        (["slurm.signal=TERM@60"], "expected USR1@SECONDS or USR2@SECONDS"),
        (["slurm.job_name=bash"], "counts as a shell"),
        (["slurm.sbatch=[exclusive]"], "begin with '-'"),
        (["slurm.partition=a,b"], "slurm.partition=a,b cannot be swept"),
        (["trainer.devices=auto"], "give slurm.gpus_per_node"),
        (["run=a,b"], "run cannot be swept"),
        (["trainer.num_nodes=1,2"], "its jobs are of one shape"),
        (["resume=nowhere", "seed=1,2"], "a resumed run is one run"),
    ],
)
def test_refusals(words: list[str], sentence: str) -> None:
    assert any(sentence in line for line in problems(RECIPE, *words)), problems(RECIPE, *words)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("5:30", 330), ("02:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-1:00:05", 176405)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, seconds: int) -> None:
    assert submit._seconds(time) == seconds


def test_print_shows_the_script_and_submits_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main([RECIPE, "--print", "seed=1,2"]) == 0
    told = capsys.readouterr()
    assert told.out == prepared(RECIPE, "seed=1,2").script and "1: seed=2  run=JOB_1" in told.err
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        submit.main([RECIPE])
