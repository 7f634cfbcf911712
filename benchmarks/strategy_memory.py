"""Memory by strategy: `python -m benchmarks.strategy_memory [billions=8 learned_millions=80 ranks=8] [--measure]`.

Prints the bytes that each rank holds between steps, by the formulas of docs/cluster.md.  --measure also trains two
updates of ILF on a random DiT of 0.3 billion parameters with two processes under each strategy, and prints what the
ranks really held.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from trainers import recipes

FROZEN_BYTES, WEIGHT, GRADIENT, MASTER, MOMENTS = 2, 4, 4, 4, 8
STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")


def held_bytes(strategy: str, frozen: float, learned: float, ranks: int) -> float:
    """Bytes per rank between two steps.

    Args:
        frozen: the backbone's bytes.  learned: trained parameters, in float32.
    """
    if strategy in ("ddp", "fsdp"):
        return (frozen / ranks if strategy == "fsdp" else frozen) + learned * (WEIGHT + GRADIENT + MOMENTS)
    sharded = MASTER + MOMENTS + (0 if strategy == "deepspeed_1" else GRADIENT)
    whole = WEIGHT + (GRADIENT if strategy == "deepspeed_1" else 0)
    if strategy == "deepspeed_3":
        return (frozen + learned * sharded) / ranks + learned * WEIGHT
    return frozen + learned * whole + learned * sharded / ranks


def save_backbone(folder: Path) -> str:
    """A random DiT of 24 blocks and width 768 as a pipeline's folder."""
    from diffusers import DiTTransformer2DModel

    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline("dit")
    kept = dict(pipe.transformer.config)
    sizes = {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 24}
    names = ("in_channels", "out_channels", "sample_size", "patch_size", "num_embeds_ada_norm")
    pipe.register_modules(transformer=DiTTransformer2DModel(**sizes, **{name: kept[name] for name in names}))
    pipe.save_pretrained(folder / "random_dit")
    return str(folder / "random_dit")


def measure() -> list[dict[str, Any]]:
    """What two ranks really held, by strategy."""
    from tests import strategy_worker
    from tests.test_strategies import job, told

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"backbone__name": save_backbone(folder), "trainer__max_steps": "2", "trainer__ema": "0"}
        settings |= {"module__span_len": "1", "data__trajectories": "2", "objective__reference_steps": "3"}
        strategy_worker.start(folder, [job(one, folder, one, **settings) for one in STRATEGIES])
        for one in STRATEGIES:
            ranks = [told(folder, one, rank) for rank in (0, 1)]
            held = max(rank["held"] for rank in ranks)
            rows.append(
                {
                    "strategy": one,
                    "ranks": 2,
                    "backbone_mb": f"{ranks[0]['whole'] / 1e6:.0f}",
                    "held_mb": f"{held / 1e6:.0f}",
                    "computed_mb": f"{ranks[0]['whole'] / (2 if one in ('fsdp', 'deepspeed_3') else 1) / 1e6:.0f}",
                }
            )
    return rows


def main() -> int:
    """Print the table, measure when asked to."""
    line = recipes.read_command_line(sys.argv[1:], ["--measure", "--save"])
    billions, millions = float(line.take("billions") or 8), float(line.take("learned_millions") or 80)
    ranks = int(line.take("ranks") or 8)
    print(f"{billions:g} B frozen parameters in bfloat16, {millions:g} M learned in float32, {ranks} ranks:")
    for strategy in STRATEGIES:
        held = held_bytes(strategy, billions * 1e9 * FROZEN_BYTES, millions * 1e6, ranks)
        print(f"  {strategy:12s} {held / 1e9:8.1f} GB per rank")
    if "--measure" in line.options:
        rows = measure()
        for row in rows:
            print(f"  {row['strategy']:12s} holds {row['held_mb']} MB of {row['backbone_mb']} MB of backbone")
        if "--save" in line.options:
            print(f"rows added to {results.append('strategy_memory', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
