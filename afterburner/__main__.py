"""The console script: `afterburner fit ...` is `python -m trainers.fit ...` of a checkout."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_COMMANDS = ("fit", "submit", "evaluate", "export", "publish", "convert", "distill")


def main() -> None:
    """Run one of the commands with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        given = f"{sys.argv[1]!r} is not a command" if len(sys.argv) > 1 else "no command was given"
        sys.exit(f"{given}; use one of: {', '.join(f'afterburner {command} --help' for command in _COMMANDS)}")
    command = sys.argv.pop(1)
    # Installed, the folders lie beside this file; in a checkout one level up, as top-level packages.
    installed = (Path(__file__).parent / "trainers").is_dir()
    runpy.run_module(f"{'afterburner.' if installed else ''}trainers.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
