"""Learned KV caches on the tiny Llama: recipes that train in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.tiny_language import save_tiny_llama
from trainers import recipes


def save_tiny(folder: Path) -> str:
    """Saves the tiny Llama, and beside it a text.  Returns its name."""
    choice = random.Random(0)
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(40):  # of which some are held out
        lines = (" ".join(choice.choices(["alpha", "beta", "gamma", "delta"], k=6)) for _ in range(6))
        (text / f"{number:02}.txt").write_text("\n".join(lines))
    return str(save_tiny_llama(folder / "llama"))


def tiny_recipe(method: str, name: str, **changes: str) -> Any:
    """A recipe for a saved tiny Llama; keys are written with __ for dots."""
    own = {key.replace("__", "."): value for key, value in changes.items()}
    text = str(Path(name).with_name("text"))
    path = Path(__file__).with_name(f"{method}_tiny.yaml")
    return recipes.compose_recipe(str(path), {"backbone.name": name, "data.path": text, **own})
