"""From trained language models to the folders that ship: small weights, measured numbers, cards with samples."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.prompts import held_out_prompts
from data.stdlib_text import held_out_documents, training_documents
from modules.language_models import load_model
from trainers.backbones.llama import Material, made
from trainers.run_folder import atomic_write

MINUTES = 45
_SHOWN = {"code": 2, "prose": 1, "edit": 1}
_SAMPLE_TOKENS = 96


def publish_llama(out: Path, minutes: float = MINUTES) -> None:
    """Trains both models, or goes on with training them, and writes `out` and `<out>_draft`."""
    material, model, draft = made(out.with_name(f"{out.name}.state"), minutes)
    beside = out.with_name(f"{out.name}_draft")
    model, draft = written(model, material.tokenizer, out), written(draft, material.tokenizer, beside)
    quality, (repeated, real) = material.quality(model), material.repeats(model)
    lines = {
        "held-out bits per byte": f"{quality.bits_per_byte:.3f}",
        "held-out tokens that are its first choice": f"{quality.top1:.1%}",
        "trigrams repeated within greedy continuations (64 of 128 tokens)": f"{repeated:.1%}",
        "the same of the text that really followed": f"{real:.1%}",
        "held-out documents": f"{len(held_out_documents())} ({len(material.held_out):,} tokens)",
        "training documents": f"{len(training_documents())} ({len(material.training):,} tokens)",
    }
    text = (
        "A causal language model of the Python standard library's sources and of the language reference behind "
        "`help()`. A hash of its name chooses what is held out (`data/stdlib_text.py`)."
    )
    remade = f"llama out=FOLDER minutes={minutes:g}` (minutes of one core for the backbone, a sixth more for the draft)"
    write_language_card(out, text, lines, model, remade, _samples(model, material))
    drafted = material.quality(draft)
    lines = {
        "held-out bits per byte": f"{drafted.bits_per_byte:.3f}",
        "held-out tokens that are its first choice": f"{drafted.top1:.1%}",
        "held-out tokens at which its first choice is the backbone's": f"{_agreement(model, draft, material):.1%}",
    }
    text = (
        "The companion of `embedded:llama` for assisted decoding, distilled from it on the same text; same tokenizer."
    )
    write_language_card(beside, text, lines, draft, remade, "")


def written(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> LlamaForCausalLM:
    """Weights rounded to bfloat16 on disk, read back as everyone reads them: float32."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Without it transformers would compute in the dtype of the file.
    config = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    atomic_write(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return load_model(str(out))[0]


@torch.no_grad()
def _agreement(model: LlamaForCausalLM, draft: LlamaForCausalLM, material: Material, blocks: int = 64) -> float:
    length = model.config.max_position_embeddings
    starts = torch.arange(blocks) * ((len(material.held_out) - length) // blocks)
    same = []
    for part in starts.split(8):
        inputs = material.held_out.windows(part, length).model_inputs()
        same.append(model(**inputs).logits.argmax(-1) == draft(**inputs).logits.argmax(-1))
    return float(torch.cat(same).float().mean())


def _samples(model: LlamaForCausalLM, material: Material) -> str:
    """Greedy continuations of held-out prompts, for a person to judge."""
    shown = []
    for category, count in _SHOWN.items():
        for prompt in held_out_prompts(category, count):
            ids = material.tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=_SAMPLE_TOKENS, do_sample=False)[0, ids.shape[1] :]
            answer = material.tokenizer.decode(out, skip_special_tokens=True)
            lines = prompt.splitlines(keepends=True)
            shown.append(f"A held-out prompt's end ({category}):\n\n{_fenced(''.join(lines[-12:]))}\n\n"
                         f"and what the model goes on with:\n\n{_fenced(answer)}\n")  # fmt: skip
    return "\n## Greedy samples\n\n" + "\n".join(shown)


def _fenced(text: str) -> str:
    return "~~~~\n" + text.replace("~~~~", "~~~").rstrip("\n") + "\n~~~~"


def write_language_card(
    out: Path,
    text: str,
    lines: dict[str, str],
    model: LlamaForCausalLM,
    remade: str,
    samples: str,
    tokens: str = "byte-level BPE",
) -> None:
    """The card of an embedded language model; `remade` ends the sentence of the command that remakes it."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = "\n".join(f"| {key} | {value} |" for key, value in lines.items())
    card = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# embedded:{out.name}

{text}
{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} query and \
{config.num_key_value_heads} key-value heads, {parameters:,} parameters with \
{"tied" if config.tie_word_embeddings else "untied"} embeddings, {config.vocab_size} \
tokens ({tokens}), context {config.max_position_embeddings}.

| | |
|---|---|
{rows}

Remade by `python -m trainers.backbones {remade}; these weights and numbers come from \
torch {torch.__version__} and Python {platform.python_version()} on {platform.machine()}.
{samples}"""
    atomic_write(out / "README.md", card)
