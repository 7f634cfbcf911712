"""A backbone's last hidden states over token blocks, on disk: computed once, read back as often as needed.

A folder holds `index.json`, written last, and numbered safetensors files, which are memory-mapped when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.text import Blocks
from modules.medusa.output_layer import last_hidden_state

INDEX_FILE = "index.json"
_BEGUN_FILE = ".index.json"  # the index until all files are there
_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Index:
    fingerprint: str
    text: str
    blocks: int
    length: int
    width: int
    dtype: str
    per_file: int


@torch.no_grad()
def record_states(
    model: nn.Module,
    blocks: Blocks,
    folder: Path,
    *,
    fingerprint: str,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    notify: Callable[[str], None] = print,
) -> RecordedStates:
    """Computes and writes the state after the final norm of every token.

    Files that a killed recording left whole are kept.

    Args:
        fingerprint: of the model (`checkpoints.manifest.fingerprint`); a reader with another one is refused.
        dtype: of mixed precision, in which the states are then computed and kept; None for the model's own.
        notify: told the size before anything is written.
    Raises:
        ValueError: the folder holds another recording, or the disk has too little room.
    """
    weight = next(model.parameters())
    width = int(model.config.hidden_size)
    count, length = blocks.input_ids.shape
    kept = weight.dtype if dtype is None else dtype
    bytes_each = length * (width * kept.itemsize + 3 * 8)
    per_file = max(1, _FILE_BYTES // bytes_each)
    text = hashlib.sha256(blocks.input_ids.numpy().tobytes()).hexdigest()
    index = _Index(fingerprint, text, count, length, width, str(kept).removeprefix("torch."), per_file)
    begun = _begun(folder, index)
    size = count * bytes_each - sum(path.stat().st_size for path in begun)
    notify(f"recording {count * length:,} hidden states of width {width} in {folder}: {size / 2**20:.1f} MiB")
    folder.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{folder} has {free / 2**20:.0f} MiB left, and the states need {size / 2**20:.0f} MiB")
    _write(folder / _BEGUN_FILE, json.dumps(asdict(index)).encode())
    for number, first in enumerate(range(0, count, per_file)):
        path = folder / _name(number)
        if path not in begun:
            part = blocks.select(slice(first, first + per_file))
            few = [part.select(slice(i, i + batch_size)).to(weight.device) for i in range(0, len(part), batch_size)]
            with torch.autocast(weight.device.type, dtype, enabled=dtype is not None):
                states = [last_hidden_state(model, **blocks.model_inputs()).to("cpu", kept) for blocks in few]
            _save(path, {"states": torch.cat(states), **part.tensors()})
    _write(folder / INDEX_FILE, json.dumps(asdict(index), indent=2).encode())
    (folder / _BEGUN_FILE).unlink()
    return RecordedStates(folder, fingerprint)


class RecordedStates:
    """What `record_states` wrote; nothing is read before it is asked for."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Opens a recording.

        Raises:
            ValueError: there is no whole recording, or another model made it.
        """
        path = folder / INDEX_FILE
        if not path.is_file():
            unfinished = (folder / _BEGUN_FILE).is_file()
            raise ValueError(
                f"{folder} holds {'an unfinished' if unfinished else 'no'} recording: record the states first"
            )
        self._index = _Index(**json.loads(path.read_text(encoding="utf-8")))
        if self._index.fingerprint != fingerprint:
            raise ValueError(
                f"the states in {folder} are of a model with fingerprint {self._index.fingerprint[:19]}..., but this "
                f"one has {fingerprint[:19]}...: record them again in another folder"
            )
        files = range(-(-self._index.blocks // self._index.per_file))
        self._files = [safe_open(folder / _name(number), framework="pt") for number in files]

    def __len__(self) -> int:
        return self._index.blocks

    def batch(self, index: Tensor) -> tuple[Tensor, Blocks]:
        """States [B, L, D] and the blocks they belong to; `index` is an integer tensor [B]."""
        rows = [divmod(int(number), self._index.per_file) for number in index]

        def read(name: str) -> Tensor:
            return torch.stack([self._files[file].get_slice(name)[row] for file, row in rows])

        return read("states"), Blocks(read("input_ids"), read("position_ids"), read("labels"))


def _begun(folder: Path, index: _Index) -> list[Path]:
    """Whole files of an unfinished recording of the same blocks by the same model."""
    if not folder.exists() or not any(folder.iterdir()):
        return []
    path = folder / _BEGUN_FILE
    if not path.is_file() or _Index(**json.loads(path.read_text(encoding="utf-8"))) != index:
        raise ValueError(f"{folder} holds another recording or other files: choose another folder")
    return sorted(folder.glob("states_*.safetensors"))


def _name(number: int) -> str:
    return f"states_{number:05d}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file that is there is whole: it gets its name last."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


def _write(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(name, path)
