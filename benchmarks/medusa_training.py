"""What training Medusa's heads costs over its arithmetic, and how much memory its logits take.

    python -m benchmarks.medusa_training throughput    a training step against backbone and heads run bare
    python -m benchmarks.medusa_training memory        peak memory of a step against V x K, in chunks and whole

`throughput` runs `embedded:llama` (name another with --backbone); the bare step is the backbone's forward without
gradients, then each head's logits, cross entropy and gradients as plain autograd has them, and the optimizer's update.
`memory` measures every point in a process of its own, on random tied heads, whose gradients do not grow with V.
Both print their rows, and with --save append them to benchmarks/results/medusa_training_*.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import results
from data.text import Blocks, TokenDocument, pack
from modules.medusa import MedusaConfig, MedusaHeads, OutputLayer
from modules.medusa.output_layer import last_hidden_state
from trainers.medusa.objective import head_losses, head_weights, path_after, valid_targets
from trainers.timing import alternate, peak_memory

DECAY = 0.8


def heads_step(heads: MedusaHeads, layer: OutputLayer, hidden: torch.Tensor, blocks: Blocks, rows: int) -> None:
    """Loss and gradients of all heads as in training."""
    found = head_losses(heads, hidden, blocks, layer, kind="ce", eta=3.0, rows=rows)
    weights = head_weights(len(found), DECAY)
    torch.stack([weight * one.loss for weight, one in zip(weights, found, strict=True)]).sum().backward()


def bare_step(heads: MedusaHeads, layer: OutputLayer, hidden: torch.Tensor, blocks: Blocks) -> None:
    """The same by plain autograd, with every head's logits in memory."""
    losses, states = [], None
    n, t = torch.ones_like(blocks.labels).nonzero(as_tuple=True)
    path, flat = path_after(blocks, n, t, heads.config.num_heads), hidden.flatten(0, 1)
    for head, weight in enumerate(head_weights(heads.config.num_heads, DECAY)):
        states, ahead = heads.states(flat, layer, head, path, states), head + 2
        n, t = valid_targets(blocks, ahead).nonzero(as_tuple=True)
        logits = heads.guesses(states.view(*hidden.shape)[n, t], layer, head)
        losses.append(weight * functional.cross_entropy(logits.float(), blocks.labels[n, t + ahead]))
    torch.stack(losses).sum().backward()


def _random_blocks(vocabulary: int, length: int, count: int) -> Blocks:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(2, vocabulary, (count, length), generator=generator).tolist()
    return pack([TokenDocument(ids, [True] * length) for ids in texts], length, 0, whole=True)


def throughput(args: argparse.Namespace) -> None:
    """Seconds of a step through the task, and of the bare one, in turns."""
    from trainers.recipes import compose_recipe
    from trainers.training import build_task

    # The time of a step does not depend on whose text it is.
    named = {"backbone.name": args.backbone} if args.backbone else {}
    own = {"module.vocabulary": "own", "module.draft_vocab_size": "null", "module.rank": "null"}
    whole = {"data.recorded": "null", "objective.positions": "null", "data.batch_size": "8"}
    recipe = compose_recipe(args.recipe, {"data.answers": "0", **whole, **own, **named})
    task = build_task(recipe)
    batch = next(iter(task.train_dataloader()))
    heads, device = task.learned.heads, task.model.device
    batch = tuple(None if part is None else part.to(device) for part in batch)
    blocks = Blocks(*batch[:3])
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-6, fused=True)

    def step(loss: Callable[[], None]) -> None:
        optimizer.zero_grad()
        loss()
        optimizer.step()

    def trained() -> None:
        task.training_step(batch, 0).backward()
        task.take_notes()

    def bare() -> None:
        with torch.no_grad():
            hidden = last_hidden_state(
                task.model, input_ids=blocks.input_ids, position_ids=blocks.position_ids, use_cache=False
            )
        bare_step(heads, task.layer, hidden, blocks)

    timings = alternate(
        {"bare": lambda: nullcontext(lambda: step(bare)), "task": lambda: nullcontext(lambda: step(trained))},
        "bare",
        device=device,
        rounds=args.rounds,
    )
    low, high = timings["task"].speedup_range
    row = {
        "recipe": recipe.recipe,
        "tokens": blocks.input_ids.numel(),
        "bare_s": round(timings["bare"].latency_s, 4),
        "task_s": round(timings["task"].latency_s, 4),
        "throughput_of_bare": round(timings["task"].speedup, 3),
        "lowest": round(low, 3),
        "highest": round(high, 3),
    }
    _tell("throughput", [row], args.save)


def memory(args: argparse.Namespace) -> None:
    """A curve over V x K, each point measured by a fresh process."""
    rows = []
    for chunked in (True, False):
        for vocabulary in (4096, 16384, 65536):
            for heads in (1, 4):
                point = ["point", f"--vocabulary={vocabulary}", f"--heads={heads}", *(["--chunked"] if chunked else [])]
                command = [sys.executable, "-m", "benchmarks.medusa_training", *point]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak = float(done.stdout.split()[-1])
                rows.append({"chunked": chunked, "vocabulary": vocabulary, "heads": heads, "peak_mib": peak})
    _tell("memory", rows, args.save)


def _tell(name: str, rows: list[dict[str, Any]], save: bool) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if save:
        print(results.append(f"medusa_training_{name}", rows))


def point(args: argparse.Namespace) -> None:
    """Prints by how many MiB a step's peak lies above what was resident before it."""
    width, blocks = 64, _random_blocks(args.vocabulary, 512, 4)
    torch.manual_seed(0)
    layer = OutputLayer(nn.Linear(width, args.vocabulary, bias=False).requires_grad_(False))
    config = MedusaConfig(hidden_size=width, vocab_size=args.vocabulary, num_heads=args.heads, vocabulary="tied")
    heads, hidden = MedusaHeads(config).start_from(layer), torch.randn(4, 512, width)
    rows = max(1, (16 << 20) // (4 * args.vocabulary))

    def step() -> None:
        if args.chunked:
            heads_step(heads, layer, hidden, blocks, rows)
        else:
            bare_step(heads, layer, hidden, blocks)

    before = peak_memory(lambda: None, torch.device("cpu"))
    print(round((peak_memory(step, torch.device("cpu")) - before) / 2**20, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("throughput")
    first.add_argument("--recipe", default="medusa_llama")
    first.add_argument("--backbone", default=None)
    first.add_argument("--rounds", type=int, default=7)
    first.set_defaults(run=throughput)
    second = commands.add_parser("memory")
    second.set_defaults(run=memory)
    for command in (first, second):
        command.add_argument("--save", action="store_true")
    one = commands.add_parser("point")
    one.add_argument("--vocabulary", type=int, required=True)
    one.add_argument("--heads", type=int, required=True)
    one.add_argument("--chunked", action="store_true")
    one.set_defaults(run=point)
    arguments = parser.parse_args()
    arguments.run(arguments)
