"""The manifest of an adapter: what it is, which backbone it was made on, and what its numbers hold for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_MAX_CONFIG_BYTES = 4 * 1024**2
_SAMPLED_SIGNS = 256  # of each tensor
_DEPTH_AND_WIDTH = (
    "class",
    "num_layers",
    "num_single_layers",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "attention_head_dim",
)
# How a model is run, not what it is; these change with the library or with a call and never refuse an adapter.
_RUNTIME_FIELDS = frozenset(
    "architectures attn_implementation dtype name_or_path output_attentions output_hidden_states return_dict "
    "torch_dtype transformers_version use_cache".split()
)


class AdapterError(ValueError):
    """An adapter cannot be written, read or attached; the message is one sentence for the person who asked for it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of an adapter but its tensors, as `adapter_config.json` holds it.

    Attributes:
        method: stem of the module that attaches it (`modules/<method>.py`).
        module: the module's config dataclass as a dict.
        base_model_name_or_path: what the backbone was loaded from: a Hub id, a folder, or `embedded:<name>`.
        base_model_revision: commit of a Hub id.
        base_model_fingerprint: `fingerprint(backbone)`.
        base_model_config: `describe(backbone)`; lets a refusal name the field that differs.
        valid_for: what the numbers hold for, see `check_valid_for`.
        made_by: recipe, code and library versions, steps, seed.
        trained: the table of what was trained, frozen and copied.
        call: keyword arguments that the accelerated pipeline call needs.
        tensors: dtype and shape by tensor name; `write_adapter` fills it in.
        tensors_sha256: of the tensor file; `write_adapter` fills it in.
        format: of this file; a reader refuses what is newer than itself.
    """

    method: str
    module: dict[str, Any]
    base_model_name_or_path: str
    base_model_fingerprint: str
    base_model_revision: str | None = None
    base_model_config: dict[str, Any] = field(default_factory=dict)
    valid_for: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    trained: list[dict[str, Any]] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    tensors_sha256: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """Sorted JSON, so that equal adapters are equal files.  Raises AdapterError on values that JSON lacks."""
        try:
            return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise AdapterError(
                f"the manifest of this {self.method} adapter cannot be written as JSON: {error}"
            ) from error


def one_sentence(error: object) -> str:
    """Somebody else's message, to be quoted within a sentence of ours."""
    return " ".join(str(error).split()).replace(". ", "; ").rstrip(".")


def aside_of(folder: Path) -> Path:
    """Where an older adapter waits while a file system without atomic exchange puts the newer one in its place."""
    return folder.with_name(f".{folder.name}.old")


def find_adapter(folder: str | Path) -> Path:
    """The folder itself, or the older adapter that a killed write left aside; AdapterError if neither is there."""
    path = Path(folder).expanduser().resolve()
    if path.is_dir():
        return path
    if aside_of(path).is_dir():
        return aside_of(path)
    raise AdapterError(f"there is no adapter folder {folder}; give the folder that holds {CONFIG_FILE}")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an adapter folder; AdapterError says what is missing, damaged, or newer than this code."""
    path = find_adapter(folder) / CONFIG_FILE
    return _validated(_read_json(path), path)


def adapter_sha256(folder: str | Path) -> str:
    """What tells one adapter from another: the hash of its manifest, which holds the hash of its tensors."""
    return hashlib.sha256((find_adapter(folder) / CONFIG_FILE).read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} is not an adapter: it has no {CONFIG_FILE}") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{path} is larger than {_MAX_CONFIG_BYTES} bytes, which no manifest is; export the adapter again"
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}); export the adapter again") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds a {type(values).__name__}, not a JSON object; export the adapter again")
    return values


def _validated(values: dict[str, Any], path: Path) -> Manifest:
    if "peft_type" in values:
        raise AdapterError(f"{path} describes a PEFT adapter ({values['peft_type']}); load it with the library peft")
    number = values.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise AdapterError(f"{path} has format {number!r}, which is not one of 1 to {FORMAT}; export the adapter again")
    if number > FORMAT:
        raise AdapterError(f"{path} has format {number} but this version reads up to {FORMAT}; update afterburner")
    fields = dataclasses.fields(Manifest)
    missing = sorted(
        f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    )
    unknown = sorted(values.keys() - {f.name for f in fields})
    if missing or unknown:
        raise AdapterError(
            f"{path} lacks the fields {missing} and has the unknown fields {unknown}; export the adapter again"
        )
    for f in fields:
        kinds = _JSON_KINDS[str(f.type)]
        if f.name in values and not isinstance(values[f.name], kinds):
            raise AdapterError(
                f"{path} has {f.name} of type {type(values[f.name]).__name__}, not {f.type}; export again"
            )
    return Manifest(**values)


_JSON_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "dict[str, Any]": (dict,),
    "list[dict[str, Any]]": (list,),
}


def describe(backbone: nn.Module) -> dict[str, Any]:
    """Class and configuration of a backbone, as JSON values, without paths, versions and run-time switches."""
    model = _plain(backbone)
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, Mapping) else {}
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in _RUNTIME_FIELDS}
    known: dict[str, Any] = json.loads(json.dumps({k: v for k, v in kept.items() if _is_json(v)}))
    return {"class": type(model).__name__, **known}


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _plain(model: nn.Module) -> nn.Module:
    """The model under torch.compile's wrapper."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def fingerprint(backbone: nn.Module) -> str:
    """`sha256:...` of the class name, of the parameters' names and shapes, and of a sample of their values' signs.

    The same weights give the same fingerprint whichever dtype they were loaded in.  No rounding can promise that for
    magnitudes (float32 -> float16 -> bfloat16 differs from float32 -> bfloat16 wherever the first step lands on a tie),
    while every conversion keeps the sign bit, even of what underflows.  256 evenly spaced elements of each tensor
    tell trainings and fine-tunings apart; a model scaled by a positive factor is not told apart, and this is no
    protection against forgery.  One transfer from the device, a few milliseconds for a small model.
    """
    named = sorted(_plain(backbone).named_parameters())
    outline = [type(_plain(backbone)).__name__, *((name, list(parameter.shape)) for name, parameter in named)]
    digest = hashlib.sha256(json.dumps(outline).encode())
    signs = []
    for _, parameter in named:
        values = parameter.detach().reshape(-1)
        if values.is_floating_point() and len(values):
            signs.append(torch.signbit(values[:: max(1, len(values) // _SAMPLED_SIGNS)][:_SAMPLED_SIGNS]))
    if signs:
        digest.update(torch.cat(signs).cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def check_valid_for(manifest: Manifest, backbone: nn.Module, **running: Any) -> None:
    """Refuse a backbone or a setting that the adapter was not made for.

    Args:
        manifest: the adapter's.  An entry of its `valid_for` is one value, or a list of the allowed values where what
            runs is no list itself; dictionaries are compared entry by entry.
        backbone: its configuration is compared field by field, depth and width first, then its weights by fingerprint.
        running: what runs now, by the names of `valid_for`; the dtype is taken from the backbone.
    Raises:
        AdapterError: one sentence with the first difference and both values.
    """
    made, here = manifest.base_model_config, describe(backbone)
    order = sorted(made.keys() & here.keys(), key=lambda name: (_rank(name), name))
    different = [f"{name} {made[name]!r} (here {here[name]!r})" for name in order if not _equal(made[name], here[name])]
    base = manifest.base_model_name_or_path + (
        f" at {manifest.base_model_revision}" if manifest.base_model_revision else ""
    )
    advice = f"load the adapter made for this backbone, or the backbone {base}"
    if different:
        raise AdapterError(
            f"this {manifest.method} adapter was made for a backbone with {', '.join(different[:4])}: {advice}"
        )
    if (found := fingerprint(backbone)) != manifest.base_model_fingerprint:
        wanted = manifest.base_model_fingerprint
        raise AdapterError(
            f"this {manifest.method} adapter was made for weights with fingerprint {wanted[:19]}... but this backbone, "
            f"of the same architecture, has {found[:19]}...: {advice}"
        )
    dtype = next((str(p.dtype).removeprefix("torch.") for p in backbone.parameters() if p.is_floating_point()), None)
    for name, value in {"dtype": dtype, **running}.items():
        if name in manifest.valid_for:
            _check_entry(name, manifest.valid_for[name], value, manifest.method)


def _rank(name: str) -> int:
    return _DEPTH_AND_WIDTH.index(name) if name in _DEPTH_AND_WIDTH else len(_DEPTH_AND_WIDTH)


def _check_entry(name: str, allowed: Any, value: Any, method: str) -> None:
    if isinstance(allowed, dict) and isinstance(value, Mapping):
        for key in allowed:
            _check_entry(f"{name}.{key}", allowed[key], value.get(key), method)
        return
    choices = allowed if isinstance(allowed, list) and not isinstance(value, list | tuple) else [allowed]
    if not any(_equal(choice, value) for choice in choices):
        wanted = " or ".join(repr(choice) for choice in choices)
        raise AdapterError(
            f"this {method} adapter holds for {name} {wanted} but {name} is {value!r} here; change it or retrain"
        )


def _equal(made: Any, here: Any) -> bool:
    if isinstance(made, list | tuple) and isinstance(here, list | tuple):
        return len(made) == len(here) and all(map(_equal, made, here))
    if isinstance(made, float) or isinstance(here, float):
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (made, here))
        return numbers and math.isclose(made, here, rel_tol=1e-6)
    return type(made) is type(here) and bool(made == here)
