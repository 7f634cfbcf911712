"""Medusa heads in the folders that serving engines read: layout R (the reference, TGI, TensorRT-LLM) and V (vLLM)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoints.save import write_folder
from modules.medusa import MedusaConfig, OutputLayer

R_FILE, V_FILE, CONFIG = "medusa_lm_head.safetensors", "model.safetensors", "config.json"
_PICKLES = ("*.pt", "*.bin", "*.pth", "*.ckpt", "*.pkl")
_R_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_R_MATRIX = re.compile(r"(\d+)\.(\d+)\.weight")
_V_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_V_MATRIX = re.compile(r"lm_heads\.(\d+)\.weight")

ENGINES = {
    "tgi": "Text Generation Inference reads this folder (layout R), drafts the top-1 chain, and stops drafting above "
    "128 tokens in a batch; TensorRT-LLM's old engine builder reads the same names. vLLM and SGLang do not.",
    "vllm": "vLLM 0.25 and 0.26 read this folder with the speculative config "
    '`{"method": "medusa", "model": "<this folder>", "num_speculative_tokens": <heads>}` and draft the top-1 chain; '
    "later versions have no Medusa any more. TGI and SGLang do not read it.",
}


@dataclass(frozen=True)
class Layout:
    """A folder's content: config.json, the tensors, and the name of their file."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str


def to_layout_r(config: MedusaConfig, tensors: Mapping[str, Tensor], layer: OutputLayer, base: str) -> Layout:
    """Heads as the reference and TGI name them.

    Args:
        tensors: the adapter's.
        layer: the backbone's output layer, for low-rank heads, which become matrices of their own.
        base: the backbone's name, for the config.
    Raises:
        ValueError: the layout has no place for what these heads are.
    """
    _refuse_what_engines_lack(config, "tgi")
    if config.vocabulary == "pruned":
        raise ValueError("format tgi has no place for the token map of pruned heads: export them as vllm")
    if config.vocabulary == "tied" and config.num_blocks != 1:
        raise ValueError(f"format tgi reads tied heads of 1 block only, and these have {config.num_blocks}")
    out: dict[str, Tensor] = {}
    for head in range(config.num_heads):
        for block in range(config.num_blocks):
            for kind in ("weight", "bias"):
                name = f"heads.{head}.blocks.{block}.linear.{kind}"
                out[f"{head}.{block}.linear.{kind}"] = tensors[name]
        if (matrix := _matrix(config, tensors, head, layer)) is not None:
            out[f"{head}.{config.num_blocks}.weight"] = matrix
    values: dict[str, Any] = {
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_blocks,
        "base_model_name_or_path": base,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    if config.vocabulary == "tied":
        values["version"] = "2"  # without it the heads' own matrices are looked for
    return Layout(values, out, R_FILE)


def to_layout_v(config: MedusaConfig, tensors: Mapping[str, Tensor], layer: OutputLayer) -> Layout:
    """Heads as vLLM names them; arguments and errors as of `to_layout_r`."""
    _refuse_what_engines_lack(config, "vllm")
    out: dict[str, Tensor] = {}
    for head in range(config.num_heads):
        for block in range(config.num_blocks):
            for kind in ("weight", "bias"):
                name = f"heads.{head}.blocks.{block}.linear.{kind}"
                out[f"blocks.{head}.layers.{block}.{kind}"] = tensors[name]
        if (matrix := _matrix(config, tensors, head, layer)) is not None:
            out[f"lm_heads.{head}.weight"] = matrix
    if config.vocabulary == "tied":
        out["lm_head.weight"] = layer.weight.detach()  # without it the engine runs on random numbers
    if config.vocabulary == "pruned":
        out["token_map"] = tensors["token_ids"]
    values: dict[str, Any] = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.output_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_blocks,
        "medusa_fc_bias": True,  # unknown names are skipped, so without the flag the biases would be lost
        "original_lm_head": config.vocabulary == "tied",
    }
    if layer.scale != 1.0:
        values["logit_scale"] = layer.scale
    return Layout(values, out, V_FILE)


def _refuse_what_engines_lack(config: MedusaConfig, name: str) -> None:
    if config.lora is not None:
        raise ValueError(f"format {name} has no place for the LoRA that these Medusa-2 heads need on their backbone")
    if config.reads != "state":
        raise ValueError(f"format {name} has no place for the matrices with which these heads read tokens")
    if config.layers:
        raise ValueError(f"format {name} has no place for what these heads read of layers {config.layers}")
    if config.output_bias:
        raise ValueError(f"format {name} has no place for the bias of these heads' output matrices")


def _matrix(config: MedusaConfig, tensors: Mapping[str, Tensor], head: int, layer: OutputLayer) -> Tensor | None:
    """A head's own output matrix; None where it is the backbone's."""
    prefix = f"heads.{head}.vocabulary."
    if config.vocabulary in ("own", "pruned"):
        return tensors[f"{prefix}weight"]
    if config.vocabulary == "tied":
        return None
    base, up, down = layer.weight.detach().cpu(), tensors[f"{prefix}up"], tensors[f"{prefix}down"]
    return (base.float() + up.float() @ down.float()).to(base.dtype)


def write_layout(
    name: str, folder: Path, config: MedusaConfig, tensors: Mapping[str, Tensor], layer: OutputLayer, base: str
) -> None:
    """Write an engine's folder, whole or not at all; arguments and errors as of `to_layout_r`.

    Args:
        name: one of `ENGINES`.
    """
    if name == "tgi":
        layout = to_layout_r(config, tensors, layer, base)
    else:
        layout = to_layout_v(config, tensors, layer)
    # Equal storages (one matrix under several names) would be refused by the format.
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in sorted(layout.tensors.items())}
    files = {
        layout.file: safetensors.torch.save(kept, metadata={"format": "pt"}),
        CONFIG: (json.dumps(layout.config, indent=2, sort_keys=True) + "\n").encode(),
        "README.md": f"# Medusa heads for {base}\n\n{ENGINES[name]}\n".encode(),
    }
    write_folder(folder, files, marker=layout.file, what=name)


def read_layout(folder: Path, layer: OutputLayer) -> tuple[MedusaConfig, dict[str, Tensor]]:
    """The heads of a folder of either layout, as an adapter names them.

    What the heads are is taken from the tensors; the config.json of published folders is known to be wrong about it.

    Raises:
        ValueError: no safetensors file (a pickle is never opened), or a tensor that is unknown, missing or of another
            shape than the backbone asks for.
    """
    file = next((folder / name for name in (R_FILE, V_FILE) if (folder / name).is_file()), None)
    if file is None:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        found = f"holds {pickles[0]}, a pickle, which can run code when opened" if pickles else "holds no Medusa heads"
        raise ValueError(f"{folder} {found}: give a folder with {R_FILE} (layout R) or {V_FILE} (layout V)")
    try:
        found_tensors = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): get it again") from error
    if any(name.startswith("blocks.") for name in found_tensors):
        return _from_v(file, found_tensors, layer)
    return _from_r(file, found_tensors, layer)


def _from_r(file: Path, found: dict[str, Tensor], layer: OutputLayer) -> tuple[MedusaConfig, dict[str, Tensor]]:
    named = {name: _R_BLOCK.fullmatch(name) for name in found}
    heads, blocks = _counts(file, [(int(m[1]), int(m[2])) for m in named.values() if m])
    matrices = {int(m[1]): name for name in found if (m := _R_MATRIX.fullmatch(name)) and int(m[2]) == blocks}
    renamed = {f"heads.{m[1]}.blocks.{m[2]}.linear.{m[3]}": found[name] for name, m in named.items() if m}
    renamed |= {f"heads.{head}.vocabulary.weight": found[name] for head, name in matrices.items()}
    used = {name for name, m in named.items() if m} | set(matrices.values())
    return _checked(file, heads, blocks, "own" if matrices else "tied", None, renamed, found.keys() - used, layer)


def _from_v(file: Path, found: dict[str, Tensor], layer: OutputLayer) -> tuple[MedusaConfig, dict[str, Tensor]]:
    found = {name.removeprefix("medusa_heads."): value for name, value in found.items()}
    named = {name: _V_BLOCK.fullmatch(name) for name in found}
    heads, blocks = _counts(file, [(int(m[1]), int(m[2])) for m in named.values() if m])
    matrices = {int(m[1]): name for name in found if (m := _V_MATRIX.fullmatch(name))}
    renamed = {f"heads.{m[1]}.blocks.{m[2]}.linear.{m[3]}": found[name] for name, m in named.items() if m}
    biased = [name for name in renamed if name.endswith("bias")]
    if not biased:  # a checkpoint without biases is whole; with some it is not
        renamed |= {
            name.replace("weight", "bias"): value.new_zeros(len(value)) for name, value in list(renamed.items())
        }
    renamed |= {f"heads.{head}.vocabulary.weight": found[name] for head, name in matrices.items()}
    used = {name for name, m in named.items() if m} | set(matrices.values()) | {"lm_head.weight", "token_map"}
    drafted = found.get("token_map") if matrices else None
    kind = "tied" if not matrices else "own" if drafted is None else "pruned"
    if kind == "tied":
        _check_shared(file, found, layer)
    if drafted is not None:
        renamed["token_ids"] = drafted.long()
    return _checked(file, heads, blocks, kind, drafted, renamed, found.keys() - used, layer)


def _check_shared(file: Path, found: Mapping[str, Tensor], layer: OutputLayer) -> None:
    shared, own = found.get("lm_head.weight"), layer.weight.detach().cpu()
    if shared is None:
        raise ValueError(f"{file} lacks lm_head.weight, without which its heads have no output matrix")
    if shared.shape != own.shape or not torch.equal(shared.to(own.dtype), own):
        raise ValueError(f"lm_head.weight in {file} is not this backbone's output matrix: give the heads' own backbone")


def _counts(file: Path, places: list[tuple[int, int]]) -> tuple[int, int]:
    if not places:
        raise ValueError(f"{file} holds no residual block of a Medusa head")
    return 1 + max(head for head, _ in places), 1 + max(block for _, block in places)


def _checked(
    file: Path,
    heads: int,
    blocks: int,
    kind: str,
    drafted: Tensor | None,
    tensors: dict[str, Tensor],
    unknown: set[str],
    layer: OutputLayer,
) -> tuple[MedusaConfig, dict[str, Tensor]]:
    size, width = layer.weight.shape
    config = MedusaConfig(
        hidden_size=width,
        vocab_size=size,
        num_heads=heads,
        num_blocks=blocks,
        vocabulary=kind,
        draft_vocab_size=None if drafted is None else len(drafted),
    )
    wanted: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for block in range(blocks):
            wanted[f"heads.{head}.blocks.{block}.linear.weight"] = (width, width)
            wanted[f"heads.{head}.blocks.{block}.linear.bias"] = (width,)
        if kind != "tied":
            wanted[f"heads.{head}.vocabulary.weight"] = (config.output_size, width)
    if drafted is not None:
        wanted["token_ids"] = (len(drafted),)
    if unknown:
        raise ValueError(f"{file} holds {min(unknown)}, which is no part of Medusa heads ({len(unknown)} such)")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {missing[0]} of {heads} heads with {blocks} blocks ({len(missing)} missing)")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} in {file}, and the backbone asks for {shape}")
    return config, tensors
