"""Lays the wheel out under the one name `afterburner/`, with our own absolute imports rewritten to match.

In a checkout `modules`, `data`, `kernels`, ... are top-level packages.  Installed like that they would overwrite
Hugging Face's `kernels` and collide with the `data/` or `modules/` of every user's own project.
"""

from __future__ import annotations

import ast
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "afterburner"
PACKAGES = ("checkpoints", "data", "kernels", "modules", "trainers")
FOLDERS = (*PACKAGES, "recipes")


class OneNameHook(BuildHookInterface[Any]):
    """Hatch build hook: gives the wheel a rewritten copy of the folders (an editable install keeps the checkout)."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the copy and list its files for the wheel."""
        if self.target_name != "wheel" or version == "editable":
            return
        self._copy = Path(tempfile.mkdtemp(prefix="afterburner-wheel-"))
        for name, content in laid_out(Path(self.root)).items():
            path = self._copy / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            build_data["force_include"][str(path)] = name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copy."""
        if hasattr(self, "_copy"):
            shutil.rmtree(self._copy)


def laid_out(root: Path) -> dict[str, bytes]:
    """Contents of the wheel by their names in it; everything but caches, hidden files and Python's own leftovers."""
    sources = {NAME: f"{NAME}", **{folder: f"{NAME}/{folder}" for folder in FOLDERS}}
    files: dict[str, bytes] = {}
    for folder, place in sources.items():
        for path in sorted((root / folder).rglob("*")):
            inside = path.relative_to(root / folder)
            if path.is_dir() or "__pycache__" in inside.parts or any(part.startswith(".") for part in inside.parts):
                continue
            content = path.read_bytes()
            files[f"{place}/{inside.as_posix()}"] = rewritten(content, path) if path.suffix == ".py" else content
    return files


def rewritten(source: bytes, path: Path) -> bytes:
    """Python source with `from modules.x import y` made `from afterburner.modules.x import y`, and so on.

    Raises:
        ValueError: an import that has no equal under one name; the message says what to write instead.
    """
    lines = source.splitlines(keepends=True)
    edits: list[tuple[int, int, bytes, bytes]] = []  # line, column in bytes, old, new
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_own(node.module):
            package = str(node.module).partition(".")[0]
            column = node.col_offset + len("from ")
            edits.append((node.lineno, column, package.encode(), f"{NAME}.{package}".encode()))
        elif isinstance(node, ast.Import):
            edits += [_alias_edit(alias, path) for alias in node.names if _is_own(alias.name)]
        elif isinstance(node, ast.Call):
            _refuse_import_by_name(node, path)
    for number, column, old, new in sorted(edits, reverse=True):
        line = lines[number - 1]
        if not line.startswith(old, column):
            raise ValueError(f"{path}:{number}: this import is laid out in a way that the wheel cannot rewrite")
        lines[number - 1] = line[:column] + new + line[column + len(old) :]
    return b"".join(lines)


def _is_own(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in PACKAGES


def _alias_edit(alias: ast.alias, path: Path) -> tuple[int, int, bytes, bytes]:
    if "." in alias.name and alias.asname is None:
        package, _, name = alias.name.rpartition(".")
        raise ValueError(f"{path}:{alias.lineno}: write `from {package} import {name}`, not `import {alias.name}`")
    renamed = f"{NAME}.{alias.name}" + ("" if alias.asname else f" as {alias.name}")
    return alias.lineno, alias.col_offset, alias.name.encode(), renamed.encode()


def _refuse_import_by_name(node: ast.Call, path: Path) -> None:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in ("import_module", "run_module", "__import__") or not node.args:
        return
    name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) and node.args[0].values else node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str) and _is_own(name.value):
        raise ValueError(f"{path}:{node.lineno}: the name {name.value!r} must be built from __name__ or __package__")
