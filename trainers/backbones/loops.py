"""A short phase that unlearns loops: what the model repeats of its own greedy continuations becomes less likely.

Source: Welleck et al. 2020, arXiv:1908.04319 (sequence-level unlikelihood).
Departs from it: a divergence from the model before keeps everything else as it was, in place of the text's own loss;
and a repeated token weighs as much as the model doubts it, since a sure one is what syntax asks for, loop or not.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from data.stepped import step_generator
from data.text import TokenStream, WindowOrder
from trainers.backbones.language import keep, kept
from trainers.text_quality import greedy_continuations

_GRAM = 6  # shorter ones are what code really repeats
_PROMPT, _NEW = 96, 96
_SAVE_STEPS = 20


def unlearn_loops(
    model: LlamaForCausalLM,
    stream: TokenStream,
    state: Path,
    steps: int = 140,
    lr: float = 2e-4,
    rows: int = 16,
    anchor: float = 4.0,
) -> LlamaForCausalLM:
    """Trains the model in place; a killed run continues from `state`.

    Args:
        stream: the text that the model was trained on; prompts are taken from it as well.
        rows: continuations in one step.
        anchor: weight of the divergence from the model before, on the text, beside the loss of repeated tokens.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    before = copy.deepcopy(model).requires_grad_(False).eval()
    order = WindowOrder(stream, model.config.max_position_embeddings, batch_size=4, seed=-1)
    done = kept(state, model, [optimizer])[0] if state.is_file() else 0
    for step in range(done, steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        generator = step_generator("loops", step)
        starts = torch.randint(len(stream) - _PROMPT - _NEW, (rows,), generator=generator)
        ids, repeated = _continued(model.eval(), stream, starts)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            own = model(input_ids=ids, use_cache=False).logits[:, _PROMPT - 1 : -1].float()
            inputs = order.batch(step).model_inputs()
            drift = divergence(before(**inputs).logits, model(**inputs).logits)
        loss = anchor * drift + unlikelihood(own, ids[:, _PROMPT:], repeated)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 5 == 0:
            print(f"loops {step} drift {drift.item():.4f} repeated {float(repeated.float().mean()):.1%}", flush=True)
        if (step + 1) % _SAVE_STEPS == 0:
            keep(state, model, [optimizer], (step + 1, 0.0, 0))
    return model.eval()


def divergence(before_BTV: Tensor, now_BTV: Tensor) -> Tensor:
    """Mean KL divergence in nats of what the model says now from what it said before."""
    was, now = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (before_BTV, now_BTV))
    return functional.kl_div(now, was, log_target=True, reduction="batchmean")


def unlikelihood(logits_BTV: Tensor, ids_BT: Tensor, repeated_BT: Tensor) -> Tensor:
    """Mean of -log(1 - chance) over the repeated tokens, in nats, weighted by 1 - chance; 0 where none is."""
    others = logits_BTV.scatter(2, ids_BT[:, :, None], -torch.inf)
    unlikely = logits_BTV.logsumexp(-1) - others.logsumexp(-1)  # finite however sure the model is
    weight = repeated_BT * torch.exp(-unlikely.detach())  # 1 - chance
    return (unlikely * weight).sum() / weight.sum().clamp_min(1e-3)


def _continued(model: LlamaForCausalLM, stream: TokenStream, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy continuations with their prompts [B, T], and which of the new tokens close a loop [B, new]."""
    prompts = stream.ids[starts[:, None] + torch.arange(_PROMPT)]
    rows, marks = [], []
    for prompt, new in zip(prompts.tolist(), greedy_continuations(model, prompts, _NEW), strict=True):
        mark = _looping(prompt, new)
        missing = _NEW - len(new)  # it ended; what fills the row is neither read nor learned
        rows.append([*prompt, *new, *[prompt[-1]] * missing])
        marks.append([*mark, *[False] * missing])
    return torch.tensor(rows), torch.tensor(marks)


def _looping(prompt: list[int], new: list[int]) -> list[bool]:
    """Whether each new token closes an n-gram of the continuation again; the prompt is at least an n-gram long."""
    seen: set[tuple[int, ...]] = set()
    ids, marks = [*prompt[1 - _GRAM :], *new], []
    for place in range(len(new)):
        gram = tuple(ids[place : place + _GRAM])
        marks.append(gram in seen)
        seen.add(gram)
    return marks
