"""What learns: one file per method in plain torch, and what the methods share."""

from pathlib import Path

import kernels

# Hugging Face ships a package `kernels` too.  Ours has no __init__.py, so theirs wins wherever it is installed and
# `kernels.<method>` would be looked for in theirs only: join the search paths.
_ours = str(Path(__file__).resolve().parents[1] / "kernels")
if _ours not in kernels.__path__:
    kernels.__path__.append(_ours)
