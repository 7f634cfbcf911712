"""python -m trainers.export run=outputs/RECIPE/RUN: write the adapter of a run's checkpoint, or an engine's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainers import recipes
from trainers.config import ExportConfig
from trainers.run_folder import RunFolder
from trainers.settings import ConfigError

USAGE = """usage: python -m trainers.export run=outputs/RECIPE/RUN [key=value ...]

  --help        this, and every key
  --print       the resolved settings as YAML, then exit"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return recipes.exit_on_error(lambda: _export(list(sys.argv[1:] if argv is None else argv)))


def _export(argv: Sequence[str]) -> int:
    config = recipes.plain_command(ExportConfig, argv, USAGE)
    if config is None:
        return 0
    folder = RunFolder(Path(config.run))
    recipe = recipes.stored_recipe(config.run, "run")
    checkpoint = Path(config.checkpoint) if config.checkpoint else folder.latest_checkpoint()
    if checkpoint is None or not checkpoint.is_file():
        raise ConfigError([f"{checkpoint or folder.checkpoints} holds no checkpoint: train with resume={config.run}"])

    from trainers import training

    output = Path(config.output) if config.output else folder.path / config.format
    try:
        task = training.build_task(recipe)
        formats = {"adapter": task.export_adapter, **task.export_formats}
        if config.format not in formats:
            raise ValueError(f"format is '{config.format}', which is not one of {', '.join(formats)} ({recipe.method})")
        training.restore(task, checkpoint)
        formats[config.format](output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    what = "adapter" if config.format == "adapter" else f"export for {config.format}"
    print(f"{output} is the {what} after step {task.steps_done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
