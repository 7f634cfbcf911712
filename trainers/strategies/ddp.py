"""DDP over what learns; the frozen backbone is never communicated, or (`fsdp`) is held in shards."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, cast

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from trainers.base import FrozenBackboneTask


class BackboneDDP(DDPStrategy):
    """Lightning's DDP that leaves the frozen backbone (and the average) out of every broadcast.

    DDP would send all parameters from rank 0 at the start and all buffers before each step; the backbone is the same
    file on every rank, and it does not change.
    """

    shards_backbone = False

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        task = cast("FrozenBackboneTask", self.lightning_module)
        # By the tensor and not by its name: LoRA hangs in the backbone's layers, and its first name is theirs.
        ours = {id(value) for value in [*task.learned.parameters(), *task.learned.buffers()]}
        named = [*model.named_parameters(), *model.named_buffers()]
        left_out = [name for name, value in named if id(value) not in ours]
        self._ddp_kwargs["find_unused_parameters"] = task.may_leave_unused
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)
        return super()._setup_model(model)


class ShardedBackboneDDP(BackboneDDP):
    """DDP over what learns, FSDP2 over the frozen backbone: each rank holds its share, a block is whole while it runs.

    The learned part is small and replicated, so gradients, optimizer, average and checkpoint are those of DDP.
    """

    shards_backbone = True

    def model_to_device(self) -> None:
        """Shards are made on the device they will stay on."""
        super().model_to_device()
        task: FrozenBackboneTask = self.lightning_module  # type: ignore[assignment]
        whole, ours = set(task.runs_past_hooks()), set(task.learned.parameters())  # LoRA hangs in the blocks
        for block in task.sharded_units():
            if block not in whole:
                fully_shard(block, ignored_params=ours)
        if task.runs_whole_backbone:
            fully_shard(task.backbone, reshard_after_forward=True, ignored_params=ours)
