"""Learning-to-Cache's released routers: rows are turned round, untrained ones compute, nothing in a file is run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from checkpoints.load import load_adapter
from modules.diffusion_host import WorkCounter
from modules.pipelines import driver, load_pipeline
from tests.tiny_forecast import save_tiny
from trainers import convert
from trainers.harmonica.released import read_routers

STEPS, UNITS = 6, 8


def released(path: Path, steps: int = STEPS, units: int = UNITS, **more: Any) -> torch.Tensor:
    """A file as theirs: a row per step, counted from the last; every value is 5 or -5 by chance."""
    signs = torch.rand(steps, units, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = torch.where(signs, 5.0, -5.0)
    arguments = argparse.Namespace(model="DiT-tiny", num_sampling_steps=steps, l1=5e-6)
    routers = {f"{i}.prob": row.clone() for i, row in enumerate(logits)}
    torch.save({"routers": routers, "opt": {"state": {}}, "args": arguments, **more}, path)
    return logits


def test_rows_are_in_sampling_order_and_only_trained_ones_reuse(tmp_path: Path) -> None:
    theirs = released(tmp_path / "x.pt")
    found = read_routers(tmp_path / "x.pt")
    assert torch.equal(found.logits, theirs.flip(0)) and found.settings["l1"] == 5e-6
    # Their even rows are trained, the last denoising step's among them.
    assert found.routed == [1, 3, 5]
    mask = found.mask()
    assert mask[::2].all() and torch.equal(mask[1::2], theirs[::2].flip(0) > 0)
    assert int((~mask).sum()) == int((theirs[::2] < 0).sum())


def test_the_command_writes_an_adapter_that_skips_what_the_file_says(tmp_path: Path) -> None:
    name, source = save_tiny("dit", tmp_path), tmp_path / "x.pt"
    released(source)
    arguments = [f"source={source}", "method=harmonica", f"backbone.name={name}", f"output={tmp_path / 'adapter'}"]
    assert convert.main(arguments) == 0
    pipe = load_pipeline(name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    running = driver(pipe, name)
    with load_adapter(pipe, tmp_path / "adapter") as handle, WorkCounter(pipe) as counter:
        assert handle.sampling.timesteps[0] == 999 and handle.sampling.timesteps[-1] == 0
        running.generate([3], [1], **handle.call_kwargs)
    assert counter.submodules == int(read_routers(source).mask().sum())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    with pytest.raises(ValueError, match="timestep_spacing 'linspace' and the pipeline's has 'leading'"):
        load_adapter(pipe, tmp_path / "adapter")


class _Runs:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_files_that_would_run_something_or_hold_something_else_are_refused(tmp_path: Path) -> None:
    released(tmp_path / "evil.pt", more=_Runs(tmp_path / "made"))
    with pytest.raises(ValueError, match="holds more than tensors and arguments, and is not opened"):
        read_routers(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"holds \['weights'\], and a file of routers has 'routers' with 0.prob"):
        read_routers(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt is not a file that torch.save wrote"):
        read_routers(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="there is no such file: give one of the released"):
        read_routers(tmp_path / "none.pt")


def test_routers_of_another_backbone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, source = save_tiny("dit", tmp_path), tmp_path / "x.pt"
    released(source, units=UNITS + 2)
    arguments = [f"source={source}", "method=harmonica", f"backbone.name={name}", f"output={tmp_path / 'adapter'}"]
    assert convert.main([f"source={source}x", *arguments[1:]]) == 1
    assert "x.ptx, and there is no such folder or file: give" in capsys.readouterr().err
    assert convert.main(arguments) == 1 and not (tmp_path / "adapter").exists()
    assert "routes 10 sub-modules but" in (said := capsys.readouterr().err) and "trained on, DiT-tiny" in said
