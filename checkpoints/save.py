"""Writing an adapter folder so that whoever looks finds the old adapter or the new one, whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from checkpoints.manifest import CARD_FILE, CONFIG_FILE, TENSORS_FILE, AdapterError, Manifest, aside_of

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def write_adapter(folder: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write manifest, tensors and card as one adapter folder, replacing an older adapter there as a whole.

    The files are written and flushed to disk in a hidden folder beside it, which then takes its place in one step.
    Killed at any moment, or on a full disk, it leaves the older adapter or the new one.

    Args:
        folder: must not exist, be empty, or hold an adapter, whose other files (a report on it, say) go too.
        manifest: `tensors` and `tensors_sha256` are filled in here.
        tensors: by name; all finite, any device.
        card: text of README.md.
    Raises:
        AdapterError: nothing was changed, for the reason it names in one sentence.
    """
    target = Path(folder).expanduser().resolve()
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(tensors.items())}
    for name, tensor in kept.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name} has values that are not finite, so nothing was written to {target}")
    data = safetensors.torch.save(kept, metadata={"format": "pt"})
    table = {name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in kept.items()}
    complete = replace(manifest, tensors=table, tensors_sha256=hashlib.sha256(data).hexdigest())
    write_folder(
        target,
        {TENSORS_FILE: data, CONFIG_FILE: complete.to_json().encode(), CARD_FILE: card.encode()},
        marker=CONFIG_FILE,
        what="adapter",
    )


def write_folder(folder: str | Path, files: Mapping[str, bytes], *, marker: str, what: str) -> None:
    """Write files as one folder, replacing an older one of its kind there as a whole; see `write_adapter`.

    Args:
        folder: must not exist, be empty, or hold a file called `marker`.
        files: content by name.
        what: what the folder is, for messages.
    Raises:
        AdapterError: nothing was changed, for the reason it names in one sentence.
    """
    target = Path(folder).expanduser().resolve()
    try:
        _replace_folder(target, files, marker, what)
    except OSError as error:
        size = sum(map(len, files.values()))
        reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        raise AdapterError(
            f"the {what} ({size:,} bytes) was not written to {target}: {reason}; what was there before is untouched"
        ) from error


def replace_card(folder: str | Path, card: str) -> None:
    """Put another README.md into an adapter folder, for example with numbers that were measured after the export."""
    path = Path(folder) / CARD_FILE
    temporary = path.with_name(f".{CARD_FILE}.new")
    try:
        _write_file(temporary, card.encode())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AdapterError(f"{path} was not written: {error.strerror}; what was there before is untouched") from error


def _replace_folder(target: Path, files: Mapping[str, bytes], marker: str, what: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() and aside_of(target).is_dir():  # killed between the two renames of `_swap`
        aside_of(target).rename(target)
    if target.exists() and not _may_replace(target, marker):
        raise AdapterError(
            f"{target} exists and is no {what} folder, so it is not replaced; name a new or empty folder"
        )
    _remove_leftovers(target)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    lock = os.open(building, os.O_RDONLY)
    try:
        _try_lock(lock)
        building.chmod(0o777 & ~_umask())
        for name, content in files.items():
            _write_file(building / name, content)
        _flush_folder(building)
        _swap(building, target)
        _flush_folder(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(lock)


def _may_replace(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def _remove_leftovers(target: Path) -> None:
    """Remove the hidden folders of writers that were killed; a living one holds a lock on its own."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.new"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        if _try_lock(lock):
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """False if somebody else has it, or if the file system knows no locks (its leftovers then stay)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(building: Path, target: Path) -> None:
    """Put `building` where `target` is; what was there is then called `building`, or gone."""
    if not target.exists():
        building.rename(target)
    elif not _exchange(building, target):
        aside = aside_of(target)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)  # a reader that finds no target looks here, and so does the next write
        building.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where the system or the file system cannot."""
    renameat2: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
