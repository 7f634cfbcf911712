"""python -m trainers.backbones NAME out=FOLDER: remake an embedded backbone from nothing but installed packages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainers.backbones.publish import publish_dit, publish_pixart

_MAKERS: dict[str, Callable[[Path], None]] = {"pixart": publish_pixart, "dit": publish_dit}
USAGE = f"usage: python -m trainers.backbones {{{','.join(_MAKERS)}}} out=FOLDER"


def main(argv: list[str]) -> int:
    """The command; 2 where it was called wrongly."""
    names = [argument for argument in argv if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    if len(names) != 1 or names[0] not in _MAKERS or set(options) != {"out"}:
        print(f"{USAGE}\ngiven: {' '.join(argv) or 'nothing'}", file=sys.stderr)
        return 2
    out = Path(options["out"])
    if out.exists():
        print(f"{out} exists: remove it, or give another folder", file=sys.stderr)
        return 2
    start = time.time()
    torch.manual_seed(0)
    _MAKERS[names[0]](out)
    print(f"{names[0]} is in {out} after {(time.time() - start) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
