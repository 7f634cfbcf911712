"""Reading an adapter folder, refusing what is damaged or meant for something else, and attaching it."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from checkpoints.hub import fetch
from checkpoints.manifest import (
    CONFIG_FILE,
    HUB_ID,
    TENSORS_FILE,
    AdapterError,
    Manifest,
    check_valid_for,
    find_adapter,
    one_sentence,
    read_manifest,
)

if TYPE_CHECKING:
    from modules.contracts import Handle

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]

_MAX_HEADER_BYTES = 16 * 1024**2
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# "" in a checkout, "afterburner." in the installed package, where the folders lie under one name.
_PREFIX = __name__.removesuffix("checkpoints.load")
_ROOT = Path(__file__).resolve().parents[1]


def load_adapter(target: Any, adapter: str | Path, *, revision: str | None = None) -> Handle:
    """Attach an adapter to a pipeline or model.

    Args:
        target: a diffusers pipeline, or the backbone itself.
        adapter: an adapter folder, or a Hub id, fetched and checked by `checkpoints.hub.fetch`; nothing is executed.
        revision: commit, tag or branch of a Hub id; a commit never changes.
    Returns:
        the handle of the method's own `attach`.
    Raises:
        AdapterError: damaged, of an unknown method, or made for another backbone; nothing was attached.
    """
    folder = local_folder(adapter, revision)
    manifest = read_manifest(folder)
    attach = _attach_of(manifest.method, folder)
    check_valid_for(manifest, backbone_of(target))
    tensors = read_tensors(folder)
    try:
        handle: Handle = attach(target, manifest, tensors)
    except (RuntimeError, TypeError, KeyError) as error:  # load_state_dict and the module's config speak in these
        reason = one_sentence(error)
        raise AdapterError(
            f"the {manifest.method} adapter in {folder} does not fit this code's module: {reason}"
        ) from error
    return handle


def backbone_of(target: Any) -> nn.Module:
    """The frozen network of a pipeline (its transformer or U-Net), or the model itself."""
    for candidate in (target, getattr(target, "transformer", None), getattr(target, "unet", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise AdapterError(
        f"an adapter attaches to a diffusers pipeline or a torch module, not to a {type(target).__name__}"
    )


def known_methods() -> list[str]:
    """Stems that `modules/` and `trainers/` share: that is what a method is."""
    stems = [
        {path.stem for path in (_ROOT / name).glob("[a-z]*") if _is_python(path)} for name in ("modules", "trainers")
    ]
    return sorted(stems[0] & stems[1])


def _is_python(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def _attach_of(method: str, folder: Path) -> Any:
    if method not in (known := known_methods()):
        raise AdapterError(
            f"{folder / CONFIG_FILE} names the method {method!r}, which is not one of {', '.join(known) or 'none'}; "
            f"update afterburner, or add modules/{method}.py and trainers/{method}.py"
        )
    return method_module(method).attach


def method_module(method: str) -> Any:
    """`modules/<method>`, of a method that is known."""
    return importlib.import_module(f"{_PREFIX}modules.{method}")


def local_folder(adapter: str | Path, revision: str | None) -> Path:
    """The adapter folder itself, or where a Hub id's files were fetched to; AdapterError if there is neither."""
    try:
        return find_adapter(adapter)
    except AdapterError as error:
        if isinstance(adapter, Path) or not HUB_ID.fullmatch(adapter):
            raise AdapterError(f"{error}, or a Hub id") from None
    return fetch(adapter, revision)


def read_tensors(folder: str | Path, expected: Expected | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU.

    Args:
        folder: the adapter's; only its safetensors file is opened, never a pickle.
        expected: shape, and dtype or None for any, of every tensor by name; by default what the manifest lists.
    Raises:
        AdapterError: missing, truncated, with a header that is damaged or too large, with other names, shapes or dtypes
            than expected, with values that are not finite, or not the file that the manifest was written with.
    """
    place = find_adapter(folder)
    path, manifest = place / TENSORS_FILE, read_manifest(place)
    data = _read_bytes(path)
    header = _checked_header(data, path)
    _check_names(header, expected if expected is not None else _listed(manifest, place), path)
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path} is damaged ({error}); export or download the adapter again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path} has values in {name} that are not finite; export the adapter again")
    if hashlib.sha256(data).hexdigest() != manifest.tensors_sha256:
        raise AdapterError(
            f"{path} is not the file that {CONFIG_FILE} was written with; export or download the adapter again"
        )
    return tensors


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in _PICKLES)
        found = (
            f"has {', '.join(pickles)}, which can run code when opened and never is," if pickles else "has no tensors"
        )
        raise AdapterError(f"{path.parent} {found} and no {TENSORS_FILE}; export the adapter again") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error


def _checked_header(data: bytes, path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes by name, before anything of the size that the header claims is allocated."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8:
        raise AdapterError(
            f"{path} is truncated: {len(data)} bytes are no safetensors file; export or download it again"
        )
    if size > _MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path} claims a header of {size:,} bytes, more than the {_MAX_HEADER_BYTES:,} allowed; export again"
        )
    if size > len(data) - 8:
        raise AdapterError(
            f"{path} is truncated: its header should have {size:,} bytes, the file {len(data):,}; get it again"
        )
    try:
        entries = json.loads(data[8 : 8 + size])
        entries.pop("__metadata__", None)
        unknown = {name: entry["dtype"] for name, entry in entries.items() if entry["dtype"] not in _DTYPES}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        header = {n: (tuple(map(int, e["shape"])), _DTYPES.get(e["dtype"], torch.float32)) for n, e in entries.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterError(f"{path} has a damaged header ({error!r}); export or download the adapter again") from error
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise AdapterError(
            f"{path} holds {name} as {dtype}, which is not one of {', '.join(_DTYPES)}; export the adapter again"
        )
    if len(data) < 8 + size + end:
        raise AdapterError(
            f"{path} is truncated: {len(data):,} of {8 + size + end:,} bytes; export or download it again"
        )
    return header


def _listed(manifest: Manifest, folder: Path) -> Expected:
    try:
        entries = manifest.tensors.items()
        return {name: (tuple(map(int, e["shape"])), getattr(torch, e["dtype"])) for name, e in entries}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG_FILE} has a damaged list of tensors ({error!r}); export it again"
        ) from error


def _check_names(header: Mapping[str, tuple[tuple[int, ...], torch.dtype]], expected: Expected, path: Path) -> None:
    missing, unknown = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
    if missing or unknown:
        raise AdapterError(
            f"{path} lacks the tensors {missing[:5]} and has the unknown ones {unknown[:5]}; export it again"
        )
    for name, (shape, dtype) in expected.items():
        if header[name][0] != shape:
            raise AdapterError(f"{path} has {name} of shape {header[name][0]}, not {shape}; export the adapter again")
        if dtype is not None and header[name][1] != dtype:
            raise AdapterError(f"{path} has {name} as {header[name][1]}, not {dtype}; export the adapter again")
