"""What the embedded language models share: their tokenizer and their training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.records import tokenize
from data.stdlib_text import Document
from data.text import Blocks, TokenStream, WindowOrder
from trainers.run_folder import atomic_write
from trainers.text_quality import next_token_loss

CONTEXT = 512
END, PAD = "<|endoftext|>", "<|pad|>"
SAVE_SECONDS = 180
Loss = Callable[[Tensor, Blocks], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how wide; the time is the processor's, so that a machine's other work changes nothing."""

    minutes: float
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    lr: float = 6e-3
    other_lr: float = 3e-3
    weight_decay: float = 0.1
    tokens_a_step: int = 4096
    rows: int = 2048  # tokens in one forward; more does not fit a core's cache
    warmup: float = 0.02  # shares of the time
    decay_from: float = 0.3
    long_from: float = 0.75  # blocks of half the context before, of the whole context after


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens, which reads and writes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama; what each block adds starts at zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def stream_of(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> TokenStream:
    """The documents' tokens."""
    return TokenStream.of([tokenize({"text": document.text}, tokenizer) for document in documents])


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    both = [
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in both:
        optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"]
    return both


def rate(progress: float, recipe: Recipe) -> float:
    """The share of the learning rate at a share of the time: warm-up, constant, then linear to zero."""
    late = (progress - recipe.decay_from) / (1 - recipe.decay_from)
    return min(1.0, (progress + 1e-3) / recipe.warmup, max(0.0, 1 - late))


def train(
    name: str,
    model: LlamaForCausalLM,
    stream: TokenStream,
    recipe: Recipe,
    state: Path,
    loss_of: Loss = next_token_loss,
    judge: Callable[[], str] = lambda: "",
) -> LlamaForCausalLM:
    """Trains for the recipe's minutes; a killed run continues from `state`, the time it had spent included.

    Raises:
        ValueError: the loss is not finite.
    """
    torch.set_flush_denormal(True)
    both = optimizers(model, recipe)
    step, spent, tokens = kept(state, model, both) if state.is_file() else (0, 0.0, 0)
    model.train()
    saved, running = spent, 0.0
    while (progress := spent / (60 * recipe.minutes)) < 1:
        began = time.process_time()
        for group in (optimizer.param_groups[0] for optimizer in both):
            group["lr"] = group["initial_lr"] * rate(progress, recipe)
        length = CONTEXT if progress >= recipe.long_from else CONTEXT // 2
        order = WindowOrder(stream, length, recipe.tokens_a_step // length, seed=length)
        loss = _step(model, both, order.batch(step), recipe.rows // length, loss_of)
        if not math.isfinite(loss):
            raise ValueError(f"{name}: the loss of step {step} is {loss}: remove {state}, or lower the learning rate")
        running = loss if running == 0 else 0.98 * running + 0.02 * loss
        step, tokens = step + 1, tokens + recipe.tokens_a_step
        spent += time.process_time() - began
        if step % 50 == 0:
            print(f"{name} {step} loss {running:.4f} {tokens / 1e6:.2f}M tokens {spent / 60:.1f} min", flush=True)
        if spent - saved >= SAVE_SECONDS:
            saved = spent
            keep(state, model, both, (step, spent, tokens))
            print(f"{name} {step} {judge()}", flush=True)
            model.train()
    keep(state, model, both, (step, spent, tokens))
    return model.eval()


def _step(
    model: LlamaForCausalLM, both: list[torch.optim.Optimizer], blocks: Blocks, rows: int, loss_of: Loss
) -> float:
    total, parts = 0.0, math.ceil(len(blocks) / rows)
    for first in range(0, len(blocks), rows):
        part = blocks.select(slice(first, first + rows))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**part.model_inputs()).logits
        loss = loss_of(logits, part) / parts
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in both:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def keep(state: Path, model: nn.Module, both: list[torch.optim.Optimizer], done: tuple[int, float, int]) -> None:
    """Writes what a killed run continues from: weights, optimizers; steps, seconds and tokens so far."""
    content = {
        "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both],
        "step": done[0], "spent": done[1], "tokens": done[2],
    }  # fmt: skip
    atomic_write(state, lambda file: torch.save(content, file))


def kept(state: Path, model: nn.Module, both: list[torch.optim.Optimizer]) -> tuple[int, float, int]:
    """Puts the weights and the optimizers back; returns steps, seconds and tokens so far."""
    content = torch.load(state, weights_only=True)
    model.load_state_dict(content["model"])
    for optimizer, values in zip(both, content["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return content["step"], content["spent"], content["tokens"]
