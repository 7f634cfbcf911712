"""An adapter with a report, and what its publication is checked against."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.card import card
from checkpoints.manifest import Manifest, adapter_sha256
from checkpoints.save import write_adapter
from tests.adapters import Backbone, manifest_for

PUBLISH = ("trainers.publish", "adapter=adapter", "repo=you/fast", "license=mit")


def make_adapter(folder: Path, seed: int = 0, **changes: Any) -> Manifest:
    """An adapter folder without a report."""
    made = manifest_for(Backbone())
    manifest = replace(made, made_by={"recipe": "fake_tiny", "seed": seed}, **changes)
    generator = torch.Generator().manual_seed(seed)
    write_adapter(folder, manifest, {"weight": torch.randn(300, 300, generator=generator)}, card(manifest))
    return manifest


def make_report(folder: Path, manifest: Manifest, **changes: Any) -> dict[str, Any]:
    """The report of the adapter in `folder`, as the evaluation leaves it there."""
    common = {"kind": "plain", "group": "20 steps", "latency_s": 0.5, "memory_bytes": 1, "work": {"blocks": 80.0}}
    rows = [
        {"name": "20 steps", "speedup": 1.0, "speedup_range": [1.0, 1.0], "quality": {"psnr_db": 47.2}, **common},
        {"name": "fake", "speedup": 2.25, "speedup_range": [2.1, 2.4], "quality": {"psnr_db": 49.5}, **common},
    ]
    rows[0]["kind"], rows[1]["kind"], rows[1]["latency_s"] = "baseline", "adapter", 0.22
    report = {
        "method": manifest.method,
        "backbone": manifest.base_model_name_or_path,
        "backbone_fingerprint": manifest.base_model_fingerprint,
        "adapter_sha256": adapter_sha256(folder),
        "device": "cpu: a processor",
        "commit": "abc",
        "seed": 1234,
        "inputs": 64,
        "reference": "50 plain steps",
        "verdict": None,
        "rows": rows,
        **changes,
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.md").write_text("# fake\n")
    (folder / "report.png").write_bytes(b"\x89PNG picture")
    return report


def make_measured(folder: Path, seed: int = 0, **changes: Any) -> Manifest:
    """An adapter folder with its report."""
    manifest = make_adapter(folder, seed, **changes)
    make_report(folder, manifest)
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    """What is published of a measured adapter, but for the card, which is written for the place."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
