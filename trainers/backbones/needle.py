"""The embedded `needle`: a small Llama that has learned to look things up in its context, by a curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.needle import END, PAD, VOCABULARY, Style, copy_rows, needle_rows, words
from data.stepped import step_generator
from data.text import IGNORED
from trainers.backbones.language import keep, kept
from trainers.backbones.publish_llama import write_language_card, written

CONTEXT = 2048
_EVERY, _SAVE = 25, 100


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: it ends when the running accuracy reaches `enough`, or after `steps`.

    lengths: one is drawn for every step; of needles the context's, on which the questions come on top.
    tokens: in a step.
    """

    task: str
    lengths: tuple[int, ...]
    tokens: int
    steps: int
    enough: float = 0.97


# Trained on needles from the start it stalls: looking for what came before is learned on copies.
CURRICULUM = (
    Stage("copy", (48,), 3072, 1500, 0.95),
    Stage("copy", (96,), 4608, 1000),
    Stage("needle", (64,), 3072, 1000),
    Stage("needle", (128,), 4096, 600),
    Stage("needle", (256,), 6144, 600),
    Stage("needle", (512,), 6144, 600),
    # The last one takes all its steps, and its learning rate falls to zero.
    Stage("needle", (64, 128, 256, 512, 1024, 2024), 6144, 1200, 2.0),
)
_LR = 3e-3


def build_needle() -> LlamaForCausalLM:
    """The untrained model: 2 layers of width 64, 4 query heads on 2 key heads of size 16."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
        )
    )  # fmt: skip


def needle_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, as `marker0 key3 value7`."""
    names = words()
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=names[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=names[END], pad_token=names[PAD], padding_side="left",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def train_needle(state: Path, curriculum: tuple[Stage, ...] = CURRICULUM) -> LlamaForCausalLM:
    """Trains through the curriculum; a killed run continues from `state`."""
    torch.set_flush_denormal(True)
    model = build_needle()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    number, step = 0, 0
    if state.is_file():
        number, _, step = kept(state, model, [optimizer])
    model.train()
    while number < len(curriculum):
        stage, right = curriculum[number], 0.0
        last = number == len(curriculum) - 1
        while step < stage.steps and right < stage.enough:
            done = step / stage.steps if last else 0.0
            warm = min(1.0, (step + 1) / 50) if number == 0 else 1.0
            optimizer.param_groups[0]["lr"] = _LR * warm * (1 - done)
            loss, hits = _step(model, optimizer, *_batch(stage, number, step))
            right = hits if step == 0 else 0.95 * right + 0.05 * hits
            step += 1
            if step % _EVERY == 0:
                print(
                    f"needle {stage.task} {stage.lengths} step {step} loss {loss:.3f} accuracy {right:.3f}", flush=True
                )
            if step % _SAVE == 0:
                keep(state, model, [optimizer], (number, 0.0, step))
        number, step = number + 1, 0
        keep(state, model, [optimizer], (number, 0.0, step))
    return model.eval()


def _batch(stage: Stage, number: int, step: int) -> tuple[Tensor, Tensor]:
    generator = step_generator("needle", number, step)
    length = stage.lengths[int(torch.randint(len(stage.lengths), (), generator=generator))]
    if stage.task == "copy":
        return copy_rows(stage.tokens // length, length, generator)
    rows = needle_rows(stage.tokens // length, length, generator, style="any")
    return rows.input_ids, rows.labels


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor
) -> tuple[float, float]:
    asked, wanted = labels[:, 1:] != IGNORED, labels[:, 1:]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][asked]
    logits = model.lm_head(hidden)
    loss = functional.cross_entropy(logits, wanted[asked])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach()), float((logits.argmax(-1) == wanted[asked]).float().mean())


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, context: int, rows: int = 64, style: Style = "any") -> float:
    """Share of questions at the end of `context` tokens that are answered rightly."""
    made = needle_rows(rows, context, step_generator("needle", "held out", context, style), style=style)
    asked, wanted = made.labels[:, 1:] != IGNORED, made.labels[:, 1:]
    guesses = torch.cat([model(input_ids=ids, use_cache=False).logits.argmax(-1) for ids in made.input_ids.split(4)])
    return float((guesses[:, :-1][asked] == wanted[asked]).float().mean())


def publish_needle(out: Path) -> None:
    """Trains the model, or goes on with training it, and writes `out`."""
    torch.set_num_threads(1)  # small matrices: a second thread waits more than it works
    model = written(train_needle(out.with_name(f"{out.name}.state.pt")), needle_tokenizer(), out)
    lines = {
        f"questions answered rightly after {context} tokens of noise with 8 needles": f"{accuracy(model, context):.1%}"
        for context in (256, 512, 1024, 2024)
    }
    text = (
        "A model that looks things up: rows of noise with needles `(marker, key, value)`, then questions "
        "`(ask, key, value)` (`data/needle.py`)."
    )
    remade = "needle out=FOLDER` (half an hour of one core at most)"
    write_language_card(out, text, lines, model, remade, "", "one a word")
