"""The forecast on the tiny pipelines: recipes that train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_ilf import save_tiny
from trainers import recipes

RECIPE = Path(__file__).with_name("forecast_tiny.yaml")

__all__ = ["save_tiny", "tiny_recipe"]


def tiny_recipe(name: str, recipe: Path = RECIPE, **changes: str) -> Any:
    """A recipe on a saved tiny backbone; keys are written with __ for dots."""
    prompts = {} if "dit" in name else {"data.prompts": str(Path(name).parent / "prompts.txt")}
    own = {key.replace("__", "."): value for key, value in changes.items()}
    return recipes.compose_recipe(str(recipe), {"backbone.name": name, **prompts, **own})
