"""From a task to the adapter's folder: manifest, tensors and card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.card import card
from checkpoints.manifest import Manifest
from checkpoints.save import write_adapter
from trainers.base import FrozenBackboneTask
from trainers.recipes import to_yaml
from trainers.run_folder import code_version, versions


def write_task_adapter(
    task: FrozenBackboneTask, folder: Path, module: dict[str, Any], tensors: Mapping[str, Tensor], **more: Any
) -> None:
    """Write the adapter of what a task learned, for its recipe's backbone.

    Args:
        module: the manifest's entry of that name; `more` are further ones.
        tensors: as they are stored, on the CPU.
    """
    backbone, (identity, description) = task.recipe.backbone, task.identity
    manifest = Manifest(
        method=task.recipe.method,
        module=module,
        base_model_name_or_path=backbone.name,
        base_model_revision=backbone.revision,
        base_model_fingerprint=identity,
        base_model_config=description,
        made_by=made_by(task),
        trained=task.parameter_table(),
        **more,
    )
    write_adapter(folder, manifest, dict(tensors), card(manifest, None))


def made_by(task: FrozenBackboneTask) -> dict[str, Any]:
    """The manifest's `made_by` entry: recipe, code, versions, steps, seed."""
    code = code_version()
    recipe = task.recipe.model_copy(update={"resume": None, "run": None})
    return {
        "recipe": task.recipe.recipe,
        "recipe_sha256": hashlib.sha256(to_yaml(recipe).encode()).hexdigest(),
        "code": code["commit"] and code["commit"] + ("-dirty" if code["dirty"] else ""),
        "versions": versions(),
        "steps": task.steps_done,
        "seed": task.recipe.seed,
    }
