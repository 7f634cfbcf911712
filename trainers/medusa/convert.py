"""Published Medusa heads become an adapter: read, checked against their backbone, calibrated."""

from __future__ import annotations

from pathlib import Path

from checkpoints.card import card
from checkpoints.manifest import Manifest, describe, fingerprint
from checkpoints.save import write_adapter
from modules.language_models import load_model
from modules.medusa import OutputLayer, StackedHeads, heads_of, module_entry
from trainers.config import ConvertConfig
from trainers.evaluation import device_of
from trainers.medusa.calibration import calibrated, greedy_texts
from trainers.medusa.layouts import read_layout
from trainers.medusa.prompts import prompts_for
from trainers.run_folder import versions

_RANKS, _PROMPT_LENGTH, _BATCH = 10, 256, 8


def convert(config: ConvertConfig) -> None:
    """Write the adapter of published heads.

    Raises:
        ValueError: the source is no folder of Medusa heads, or not this backbone's.
    """
    source = Path(config.source)
    folder = source if source.is_dir() else _fetched(config)
    backbone = config.backbone
    model, tokenizer = load_model(backbone.name, backbone.revision, backbone.dtype)
    model.to(device_of(config.device))
    layer = OutputLayer.of(model)
    bare, tensors = read_layout(folder, layer)
    tensors = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    prompts = prompts_for("calibration", config.prompts, tokenizer, config.holdout, _PROMPT_LENGTH)
    pad = int(tokenizer.pad_token_id)
    texts = greedy_texts(model, [prompt.ids for prompt in prompts], config.new_tokens, _BATCH, pad)
    heads = StackedHeads(heads_of(bare, tensors, model), layer)
    complete = calibrated(model, heads, bare, texts, _RANKS, "measured")
    manifest = Manifest(
        method="medusa",
        module=module_entry(complete),
        base_model_name_or_path=backbone.name,
        base_model_revision=backbone.revision,
        base_model_fingerprint=fingerprint(model),
        base_model_config=describe(model),
        made_by={"converted_from": config.source, "revision": config.revision, "versions": versions()},
    )
    write_adapter(config.output, manifest, tensors, card(manifest, None))


def _fetched(config: ConvertConfig) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        names = list_repo_files(config.source, revision=config.revision)
        wanted = [name for name in names if name.endswith((".json", ".safetensors"))]
        if not any(name.endswith(".safetensors") for name in wanted):
            pickles = [name for name in names if name.endswith((".pt", ".bin", ".pth", ".ckpt"))]
            held = f"only {pickles[0]}, a pickle, which can run code when opened" if pickles else "no safetensors file"
            raise ValueError(f"{config.source} holds {held}: convert it to safetensors where you trust it")
        return Path(snapshot_download(config.source, revision=config.revision, allow_patterns=wanted))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"there is no folder {config.source}, and from the Hub it cannot be read: {reason}") from error
