"""`python -m trainers.distill backbone.name=... output=...`: let a backbone answer seed prompts, resumably."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import DistillConfig
from trainers.recipes import exit_on_error, plain_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data.records import Record

USAGE = """usage: python -m trainers.distill backbone.name=<name> output=<folder> [key=value ...]

Writes answers as .jsonl files that data.path of a recipe can name.  The same command goes on where a killed one was,
with the same answers.  --print shows the resolved settings and exits."""
SETTINGS_FILE = ".distill.json"  # hidden, so that it is not read as records
_STDLIB_PROMPTS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Exit codes: 0 done, 1 refused backbone, prompts or folder, 2 wrong settings."""
    config = plain_command(DistillConfig, sys.argv[1:] if argv is None else argv, USAGE)
    if config is None:
        return 0
    try:
        run(config)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(config: DistillConfig) -> Path:
    """Answer every prompt that is not answered yet; returns the folder.

    Raises:
        ValueError: prompts or backbone cannot be read, or the folder was begun with other settings.
    """
    from checkpoints.manifest import fingerprint
    from data.answers import Answerer, Sampling
    from data.stepped import derive_seed
    from modules.language_models import load_model
    from trainers.evaluation import device_of
    from trainers.run_folder import atomic_write

    model, tokenizer = load_model(config.backbone.name, config.backbone.revision, config.backbone.dtype)
    model.to(device_of(config.device))
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p)
    answerer = Answerer(model, tokenizer, sampling)
    asked = _prompts(config, tokenizer)
    # A batch is filled up to its longest prompt: near lengths together save a third of the time.
    prompts = sorted(filter(answerer.fits, asked), key=answerer.length)
    if not prompts:
        raise ValueError(f"none of the {len(asked)} prompts leaves room for max_new_tokens={config.max_new_tokens}")
    output = Path(config.output)
    _begin(output, config, fingerprint(model), prompts)
    _announce(prompts, len(asked) - len(prompts), config, tokenizer)
    began, answered = time.monotonic(), 0
    for first in range(0, len(prompts), config.batch_size):
        # One file a batch: what is there is whole, and batches are the same whoever answers them.
        path = output / f"answers_{first:07d}.jsonl"
        if path.is_file():
            continue
        numbers = range(first, min(first + config.batch_size, len(prompts)))
        seeds = [derive_seed(config.seed, "answer", number) for number in numbers]
        records = answerer.answer([prompts[number] for number in numbers], seeds)
        atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        answered += len(records)
        speed = answered / (time.monotonic() - began)
        print(f"{numbers[-1] + 1} of {len(prompts)} answered, {speed:.2f} a second", flush=True)
    print(f"{output} holds {len(prompts)} answered prompts")
    return output


def _prompts(config: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """Records with a prompt or messages; a plain prompt is a question where the tokenizer knows conversations."""
    from data.prompts import seed_prompts
    from data.records import STDLIB, read_records

    if config.prompts == STDLIB:
        return [{"prompt": prompt} for prompt in seed_prompts(config.count or _STDLIB_PROMPTS)]
    path = Path(config.prompts)
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        found: list[Record] = [{"prompt": line} for line in lines if line.strip()]
    else:
        found = [{k: r[k] for k in ("prompt", "messages") if k in r} for r in read_records(config.prompts)]
    if not all(found) or not found:
        raise ValueError(
            f"prompts {config.prompts} has no prompts: give lines of text, or records with prompt or messages"
        )
    if tokenizer.chat_template is not None:
        found = [
            {"messages": [{"role": "user", "content": record["prompt"]}]} if "prompt" in record else record
            for record in found
        ]
    return found[: config.count]


def _begin(output: Path, config: DistillConfig, fingerprint: str, prompts: list[Record]) -> None:
    """Write down what decides the answers, or compare it with what the folder was begun with."""
    from data.stepped import derive_seed
    from trainers.run_folder import atomic_write

    settings: dict[str, Any] = {
        **config.model_dump(mode="json", exclude={"output", "device", "prompts", "count"}),
        "fingerprint": fingerprint,
        "prompts": derive_seed(*(json.dumps(prompt, sort_keys=True) for prompt in prompts)),
    }
    path = output / SETTINGS_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if before.get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{output} was begun with other settings of {', '.join(differing)}: repeat them, or choose another "
                "output"
            )
        for leftover in output.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds other files: choose another output")
    else:
        atomic_write(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _announce(prompts: list[Record], skipped: int, config: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts[:100])
    token = len(sample.encode()) / max(1, len(tokenizer(sample, verbose=False).input_ids))
    turns = sum(max(1, sum(m["role"] == "user" for m in p.get("messages", ()))) for p in prompts)
    size = turns * config.max_new_tokens * token + len(prompts) * len(sample.encode()) / min(100, len(prompts))
    print(f"{len(prompts)} prompts, at most about {size / 2**20:.1f} MiB of answers in {config.output}", flush=True)
    if skipped:
        print(f"{skipped} prompts are left out: they are empty, or leave no room for an answer", flush=True)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
