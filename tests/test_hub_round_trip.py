"""The whole way with a real method: what was published draws the same images, and can be evaluated from the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoints.load import load_adapter
from checkpoints.manifest import adapter_sha256
from checkpoints.save import write_adapter
from modules.pipelines import load_pipeline
from tests.hub_client import Client
from tests.hub_server import HubServer
from tests.published import PUBLISH
from tests.tiny_ilf import (
    INPUTS,
    SEEDS,
    driver_of,
    ilf_config,
    latents_of_call,
    manifest_of,
    noisy_module,
    save_tiny,
    solver_entry,
    tensors_of,
)

GENERATE = """
import torch
from afterburner import load_adapter
from modules.pipelines import load_pipeline
from tests.tiny_ilf import INPUTS, SEEDS, driver_of, latents_of_call
torch.set_num_threads(1)
running = driver_of(load_pipeline({name!r}), {kind!r})
handle = load_adapter(running.pipe, "you/{kind}")
torch.save(latents_of_call(running, INPUTS[{kind!r}], SEEDS, **handle.call_kwargs), "{kind}.pt")
"""
EVALUATE = """
import sys
from trainers import diffusion_cases, evaluate
for name, value in (("_BISECTIONS", 2), ("_INTERVALS", range(2, 4)), ("_WARMUPS", range(1, 3))):
    setattr(diffusion_cases, name, value)
small = ["evaluation.inputs=2", "evaluation.timing_batch=1", "evaluation.batch_size=2", "device=cpu"]
sys.exit(evaluate.main(["adapter={adapter}", *small]))
"""


def adapter_of(kind: str, folder: Path) -> str:
    """Writes `<folder>/adapter` for a saved tiny pipeline, whose name is returned."""
    name = save_tiny(kind, folder)
    running = driver_of(load_pipeline(name), kind)
    config = ilf_config(running.pipe, solver=solver_entry(running.pipe, 4))
    module = noisy_module(config, running.transformer)
    manifest = manifest_of(module, running.transformer, name)
    write_adapter(folder / "adapter", manifest, tensors_of(module), "A card.")
    return name


def test_what_was_published_draws_the_same_latents(client: Client, hub: HubServer) -> None:
    torch.set_num_threads(1)
    want, code = {}, ""
    for kind in ("pixart", "dit"):
        name = adapter_of(kind, client.folder)
        running = driver_of(load_pipeline(name), kind)
        plain = latents_of_call(running, INPUTS[kind], SEEDS)
        with load_adapter(running.pipe, client.folder / "adapter") as handle:
            want[kind] = latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
        assert not torch.equal(plain, want[kind])
        assert client.run(*PUBLISH, f"repo=you/{kind}", "unmeasured=true").code == 0
        code += GENERATE.format(name=name, kind=kind)
    # The card's own lines, too; the tiny text encoder of the other one needs arguments that no card can know.
    (shown,) = re.findall(r"```python\n(.*?)```", hub.tree("you/dit")["README.md"].decode(), flags=re.S)
    done = client.run("-c", f"{code}\n{shown}\nimages[0].save('image.png')")
    assert done.code == 0, done.err
    assert all(torch.equal(torch.load(client.folder / f"{kind}.pt"), latents) for kind, latents in want.items())
    assert (client.folder / "image.png").is_file()


@pytest.mark.slow
def test_an_adapter_is_evaluated_published_with_its_report_and_evaluated_from_the_hub(client, hub) -> None:
    adapter_of("dit", client.folder)
    done = client.run("-c", EVALUATE.format(adapter="adapter"))
    assert done.code == 0, done.err
    done = client.run(*PUBLISH)
    assert done.code == 0, done.err
    files = hub.tree("you/fast")
    report = json.loads(files["report.json"])
    assert report["adapter_sha256"] == adapter_sha256(client.folder / "adapter")
    card = files["README.md"].decode()
    assert "| ILF, 4 steps | adapter |" in card and files["report.png"].startswith(b"\x89PNG")
    fetch = "from checkpoints.load import local_folder; print(local_folder('you/fast', None))"
    snapshot = Path(client.run("-c", fetch).out.strip())
    done = client.run("-c", EVALUATE.format(adapter="you/fast"), HF_HUB_OFFLINE="1", HF_HOME=str(client.home))
    assert done.code == 0, done.err
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()}.items() <= files.items()  # left as it was
    again = json.loads((client.folder / "outputs/evaluate/fast/report.json").read_text())
    assert again["adapter_sha256"] == report["adapter_sha256"]
    assert [row["name"] for row in again["rows"]] == [row["name"] for row in report["rows"]]
    assert again["rows"][1]["quality"] == report["rows"][1]["quality"]
