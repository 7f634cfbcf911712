"""A short phase that unlearns loops: what the model repeats of its own greedy continuations becomes less likely.

Source: Welleck et al. 2020, arXiv:1908.04319 (sequence-level unlikelihood).
Departs from it: every step learns from text as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from data.stepped import step_generator
from data.text import TokenStream, WindowOrder
from trainers.text_quality import greedy_continuations, next_token_loss

_GRAM = 4
_PROMPT, _NEW = 96, 96


def unlearn_loops(
    model: LlamaForCausalLM, stream: TokenStream, steps: int = 60, lr: float = 3e-4, rows: int = 24, weight: float = 1.0
) -> LlamaForCausalLM:
    """Trains the model in place.

    Args:
        stream: the text that the model was trained on; prompts are taken from it as well.
        rows: continuations in one step.
        weight: of the repeated tokens' loss beside the text's.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order = WindowOrder(stream, model.config.max_position_embeddings, batch_size=4, seed=-1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        generator = step_generator("loops", step)
        starts = torch.randint(len(stream) - _PROMPT - _NEW, (rows,), generator=generator)
        ids, repeated = _continued(model.eval(), stream, starts)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            own = model(input_ids=ids, use_cache=False).logits[:, _PROMPT - 1 : -1].float()
            blocks = order.batch(step)
            text = next_token_loss(model(**blocks.model_inputs()).logits, blocks)
        loss = text + weight * unlikelihood(own, ids[:, _PROMPT:], repeated)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 5 == 0:
            print(f"loops {step} text {text.item():.4f} repeated {float(repeated.float().mean()):.1%}", flush=True)
    return model.eval()


def unlikelihood(logits_BTV: Tensor, ids_BT: Tensor, repeated_BT: Tensor) -> Tensor:
    """Mean of -log(1 - chance) over the repeated tokens, in nats; 0 where none is."""
    others = logits_BTV.scatter(2, ids_BT[:, :, None], -torch.inf)
    unlikely = logits_BTV.logsumexp(-1) - others.logsumexp(-1)  # finite however sure the model is
    return (unlikely * repeated_BT).sum() / repeated_BT.sum().clamp_min(1)


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
    """Whether each new token closes an n-gram that the continuation has had before."""
    seen: set[tuple[int, ...]] = set()
    ids, marks = [*prompt[1 - _GRAM :], *new], []
    for place in range(len(new)):
        gram = tuple(ids[place : place + _GRAM])
        marks.append(gram in seen)
        seen.add(gram)
    return marks
