"""python -m trainers.backbones NAME out=FOLDER: remake an embedded backbone from nothing but installed packages."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from trainers.backbones.needle import publish_needle
from trainers.backbones.publish import publish_dit, publish_pixart
from trainers.backbones.publish_llama import MINUTES, publish_llama

NAMES = ("pixart", "dit", "llama", "needle")
USAGE = f"usage: python -m trainers.backbones {{{','.join(NAMES)}}} out=FOLDER [minutes={MINUTES} (llama)]"


def main(argv: list[str]) -> int:
    """The command; 2 where it was called wrongly."""
    names = [argument for argument in argv if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    name, allowed = names[0] if names else "", {"out", "minutes"} if names == ["llama"] else {"out"}
    minutes = _positive(options.get("minutes", str(MINUTES)))
    if names != [name] or name not in NAMES or "out" not in options or options.keys() - allowed or minutes is None:
        print(f"{USAGE}\ngiven: {' '.join(argv) or 'nothing'}", file=sys.stderr)
        return 2
    out = Path(options["out"])
    if out.exists():
        print(f"{out} exists: remove it, or give another folder", file=sys.stderr)
        return 2
    start = time.time()
    torch.manual_seed(0)
    if name == "llama":
        publish_llama(out, minutes)
    elif name == "needle":
        publish_needle(out)
    elif name == "dit":
        publish_dit(out)
    else:
        publish_pixart(out)
    print(f"{name} is in {out} after {(time.time() - start) / 60:.0f} minutes")
    return 0


def _positive(text: str) -> float | None:
    try:
        return number if (number := float(text)) > 0 else None
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
