"""A backbone's last hidden states over token blocks, on disk: computed once, read back as often as needed.

A folder holds `index.json`, written last, and numbered safetensors files, which are memory-mapped when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.text import Blocks
from modules.medusa.output_layer import features

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
    layers: list[int]


@torch.no_grad()
def record_states(
    model: nn.Module,
    blocks: Blocks,
    folder: Path,
    *,
    fingerprint: str,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    layers: Sequence[int] = (),
    needed: Tensor | None = None,
    notify: Callable[[str], None] = print,
) -> RecordedStates:
    """Computes and writes the state after the final norm of every token.

    Files that a killed recording left whole are kept.

    Args:
        fingerprint: of the model (`checkpoints.manifest.fingerprint`); a reader with another one is refused.
        dtype: of mixed precision, in which the states are then computed and kept; None for the model's own.
        layers: decoder layers whose outputs are kept beside them (`modules.medusa.output_layer.features`).
        needed: bool [N, L], the tokens whose states are written; None for all.
        notify: told the size before anything is written.
    Raises:
        ValueError: the folder holds another recording, or the disk has too little room.
    """
    weight = next(model.parameters())
    width = int(model.config.hidden_size) * (1 + len(layers))
    count, length = blocks.input_ids.shape
    rows = count * length if needed is None else int(needed.sum())
    kept = weight.dtype if dtype is None else dtype
    whole = rows * width * kept.itemsize + count * length * (3 * 8 + (needed is not None))
    per_file = max(1, _FILE_BYTES * count // max(1, whole))
    text = hashlib.sha256(blocks.input_ids.numpy().tobytes() + _bytes(needed)).hexdigest()
    name = str(kept).removeprefix("torch.")
    index = _Index(fingerprint, text, count, length, width, name, per_file, list(layers))
    begun = _begun(folder, index)
    size = whole - sum(path.stat().st_size for path in begun)
    notify(f"recording {rows:,} hidden states of width {width} in {folder}: {size / 2**20:.1f} MiB")
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
                states = torch.cat([features(model, layers, **some.model_inputs()).to("cpu", kept) for some in few])
            tensors = {"states": states, **part.tensors()}
            if needed is not None:
                chosen = needed[first : first + per_file]
                tensors |= {"states": states[chosen], "needed": chosen}
            _save(path, tensors)
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
        self.layers = tuple(self._index.layers)
        masks = [file.get_tensor("needed") for file in self._files if "needed" in file.keys()]  # noqa: SIM118 - no mapping
        self._needed = torch.cat(masks) if masks else None

    def __len__(self) -> int:
        return self._index.blocks

    def batch(self, index: Tensor) -> tuple[Tensor, Blocks]:
        """States [B, L, D] and the blocks they belong to; `index` is an integer tensor [B]."""
        rows = [divmod(int(number), self._index.per_file) for number in index]

        def read(name: str) -> Tensor:
            return torch.stack([self._files[file].get_slice(name)[row] for file, row in rows])

        states = read("states") if self._needed is None else torch.stack([self._spread(*row) for row in rows])
        return states, Blocks(read("input_ids"), read("position_ids"), read("labels"))

    def covers(self, needed: Tensor) -> bool:
        """Whether the states of all these tokens, bool [N, L], are there."""
        return self._needed is None or bool((self._needed | ~needed).all())

    def _spread(self, file: int, row: int) -> Tensor:
        """The states of one block where they are needed, and zeros."""
        first = file * self._index.per_file
        here = cast(Tensor, self._needed)[first : first + row + 1]
        stop, mine = int(here.sum()), here[-1]
        states = self._files[file].get_slice("states")[stop - int(mine.sum()) : stop]
        out = states.new_zeros(len(mine), states.shape[-1])
        out[mine] = states
        return out


def _bytes(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.numpy().tobytes()


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
