"""A phase in which the last hidden state learns to tell more of what follows than the next token.

Source: Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction", arXiv:2404.19737.
Departs from it: a phase after training instead of a loss all along; on the corpus and on the model's own answers, which
are what drafting heads have to guess; a divergence from the model before keeps what it answers; and the heads, which
are thrown away, read the chosen token as `reads_root` has it (modules/medusa/heads.py).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data.answers import Answerer, Sampling
from data.prompts import seed_prompts
from data.records import tokenize
from data.stepped import StepOrder, derive_seed
from data.text import IGNORED, Blocks, TokenStream, WindowOrder, pack
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer
from modules.medusa.output_layer import last_hidden_state
from trainers.backbones.language import CONTEXT, SAVE_SECONDS, Recipe, keep, kept, optimizers, rate
from trainers.backbones.loops import divergence
from trainers.medusa.objective import head_weights, valid_targets
from trainers.run_folder import atomic_write
from trainers.text_quality import next_token_loss

_KEPT_BACK, _PROMPTS = 2400, 2400  # prompts left to those who train heads; prompts that are answered here
_ANSWER, _AT_ONCE, _TEMPERATURE = 128, 32, 0.3
_HEADS, _DECAY = 4, 0.8
_HEADS_ALONE = 0.15  # of the time: heads that know nothing yet would only disturb the model
_ROWS = 4  # of either text in a step
_Own = Callable[[Tensor], Tensor]
"""From the model's logits to its own loss."""


def own_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, count: int = _PROMPTS
) -> Blocks:
    """The model's answers to prompts of its training text, packed; a killed run goes on in `folder`."""
    answerer = Answerer(model, tokenizer, Sampling(max_new_tokens=_ANSWER, temperature=_TEMPERATURE))
    prompts = [
        record for text in seed_prompts(_KEPT_BACK + count)[_KEPT_BACK:] if answerer.fits(record := {"prompt": text})
    ]
    prompts.sort(key=lambda record: len(record["prompt"]))  # rows of a batch are filled up to the longest
    folder.mkdir(parents=True, exist_ok=True)
    documents = []
    for first in range(0, len(prompts), _AT_ONCE):
        path, part = folder / f"{first:05d}.json", prompts[first : first + _AT_ONCE]
        if not path.is_file():
            seeds = [derive_seed("foresight", first, place) for place in range(len(part))]
            atomic_write(path, json.dumps(answerer.answer(part, seeds)))
            print(f"{first + len(part)} of {len(prompts)} answered", flush=True)
        documents += [tokenize(record, tokenizer) for record in json.loads(path.read_text(encoding="utf-8"))]
    return pack(documents, CONTEXT, int(tokenizer.pad_token_id), whole=True)


def look_ahead(
    model: LlamaForCausalLM,
    stream: TokenStream,
    answers: Blocks,
    state: Path,
    recipe: Recipe,
    heads_lr: float = 6e-3,
    anchor: float = 1.0,
) -> LlamaForCausalLM:
    """Trains the model in place for the recipe's minutes of processor time; a killed run continues from `state`.

    Args:
        stream: the text that the model was trained on, `answers` its own.
        recipe: time, learning rates and weight decay; those of the heads are `heads_lr` and none.
        anchor: weight of the divergence from the model before, on its answers.
    """
    before = copy.deepcopy(model).requires_grad_(False).eval()
    layer = OutputLayer.of(model)
    vocabulary, width = layer.weight.shape
    config = MedusaConfig(hidden_size=width, vocab_size=vocabulary, num_heads=_HEADS, num_blocks=2, reads_root=True)
    heads = MedusaHeads(config).start_from(layer)
    both = nn.ModuleList([model, heads])
    own = optimizers(model, recipe)
    theirs = optimizers(heads, replace(recipe, lr=heads_lr, other_lr=heads_lr / 2, weight_decay=0.0))
    step, spent, tokens = kept(state, both, own + theirs) if state.is_file() else (0, 0.0, 0)
    windows = WindowOrder(stream, CONTEXT, _ROWS, seed=-2)
    order = StepOrder(length=len(answers), batch_size=_ROWS, seed=-2)
    saved = spent
    both.train()
    while (progress := spent / (60 * recipe.minutes)) < 1:
        began = time.process_time()
        for group in (optimizer.param_groups[0] for optimizer in own + theirs):
            group["lr"] = group["initial_lr"] * rate(progress, recipe)
        learns = progress >= _HEADS_ALONE
        text, said = windows.batch(step), answers.select(order.indices(step))
        ahead = _foresight(model, heads, layer, text, learns, partial(next_token_loss, blocks=text))
        ahead += _foresight(model, heads, layer, said, learns, partial(_drift, before, said, anchor))
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in own + theirs if learns else theirs:
            optimizer.step()
        for optimizer in own + theirs:
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + text.input_ids.numel() + said.input_ids.numel()
        spent += time.process_time() - began
        if step % 25 == 0:
            print(f"foresight {step} loss {ahead / 2:.3f} {spent / 60:.1f} min", flush=True)
        if spent - saved >= SAVE_SECONDS:
            saved = spent
            keep(state, both, own + theirs, (step, spent, tokens))
    keep(state, both, own + theirs, (step, spent, tokens))
    return model.eval()


def _foresight(
    model: LlamaForCausalLM, heads: MedusaHeads, layer: OutputLayer, blocks: Blocks, learns: bool, own: _Own
) -> float:
    """Gradients of the heads' loss on these blocks, and of the model's own while it learns; returns the former."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(learns):
            hidden = last_hidden_state(model, **blocks.model_inputs())
        weights = head_weights(_HEADS, _DECAY)
        losses = []
        for head, weight in enumerate(weights):
            n, t = valid_targets(blocks, head + 2).nonzero(as_tuple=True)
            logits = heads(hidden[n, t], layer, head, root=blocks.input_ids[n, t + 1])
            losses.append(weight * functional.cross_entropy(logits.float(), blocks.labels[n, t + head + 2]))
        ahead = torch.stack(losses).sum() / sum(weights)
        loss = ahead + own(layer.logits(hidden)) if learns else ahead
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of the phase for foresight is {loss.item()}: lower its learning rate")
    loss.backward()
    return ahead.item()


def _drift(before: LlamaForCausalLM, blocks: Blocks, weight: float, logits_BTV: Tensor) -> Tensor:
    """How far the model is from what it was where it speaks itself."""
    known = blocks.labels[:, 1:] != IGNORED
    with torch.no_grad():
        was = before(**blocks.model_inputs()).logits[:, :-1][known]
    return weight * divergence(was[None], logits_BTV[:, :-1][known][None])
