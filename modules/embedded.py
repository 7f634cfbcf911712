"""The small trained backbones that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded:"
EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "data" / "embedded"


def source_of(name: str, marker: str, kind: str) -> str:
    """What a library's `from_pretrained` is given for a backbone's name: a folder, or the Hub id as it is.

    Args:
        name: a Hub id, a folder, or `embedded:<name>`.
        marker: the file that every folder of this kind has at its root.
        kind: what such a folder is called in messages, in the singular.
    Raises:
        ValueError: no such embedded backbone, or a folder without the marker.
    """
    if name.startswith(EMBEDDED):
        folder = EMBEDDED_FOLDER / name.removeprefix(EMBEDDED)
        if not (folder / marker).is_file():
            known = sorted(path.parent.name for path in EMBEDDED_FOLDER.glob(f"*/{marker}"))
            raise ValueError(f"backbone.name is '{name}', but the embedded {kind}s are {', '.join(known) or 'none'}")
        return str(folder)
    if Path(name).is_dir() and not (Path(name) / marker).is_file():
        raise ValueError(f"the folder '{name}' holds no {kind}: it has no {marker}")
    return name
