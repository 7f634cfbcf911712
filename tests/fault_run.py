"""`python tests/fault_run.py FAULT key=value ...`: `trainers.fit` on a task of two numbers, with a fault in it.

A script of its own, since the processes of one run are started by running the same command again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints.manifest import Manifest, fingerprint  # noqa: E402
from checkpoints.save import write_adapter  # noqa: E402
from trainers import fit, training  # noqa: E402
from trainers.base import FrozenBackboneTask  # noqa: E402

AT = 3  # the step or batch of the fault


class Tiny(FrozenBackboneTask):
    """Two numbers learn to be the data's mean."""

    def __init__(self, recipe) -> None:
        torch.manual_seed(recipe.seed)
        super().__init__(nn.Linear(2, 2), nn.ParameterDict({"mean": nn.Parameter(torch.randn(2))}), recipe)

    def train_dataloader(self):
        return self.stepped_loader(self.fetch, 8, 4)

    def fetch(self, indices: Tensor) -> Tensor:
        return indices.float()[:, None].expand(-1, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (batch - self.learned["mean"]).square().mean()
        if self.global_step == AT:
            loss = loss * self.fault()
        return loss

    def fault(self) -> float:
        """Something goes wrong, or the loss is multiplied by what it returns."""
        return 1.0

    def export_adapter(self, folder: Path) -> None:
        manifest = Manifest(
            method="ilf",
            module={},
            base_model_name_or_path=self.recipe.backbone.name,
            base_model_fingerprint=fingerprint(self.backbone),
            base_model_config={},
            valid_for={},
        )
        write_adapter(folder, manifest, {"mean": self.exported["mean"].detach()}, "card")


class NaNOnSecond(Tiny):
    def fault(self) -> float:
        return float("nan") if self.global_rank == 1 else 1.0


class KillSecond(Tiny):
    def fault(self) -> float:
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0


class KillFirst(Tiny):
    def fault(self) -> float:
        if self.global_rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0


class KillSecondWhileFirstIsBusy(Tiny):
    def fault(self) -> float:
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # nothing fails in this process: it has to be told
        return 1.0


class SecondCannotStart(Tiny):
    """The first process waits for it at the rendezvous, inside a library."""

    def __init__(self, recipe) -> None:
        if os.environ.get("LOCAL_RANK") == "1":
            raise OSError(13, "Permission denied", "latents.json")
        super().__init__(recipe)


class SecondIsKilledAtTheStart(Tiny):
    def __init__(self, recipe) -> None:
        if os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(recipe)


class WorkerKilled(Tiny):
    fetched = 0

    def fetch(self, indices: Tensor) -> Tensor:
        self.fetched += 1
        if get_worker_info() is not None and self.fetched == 4:
            time.sleep(1)  # the updates before it, and their checkpoint, come first
            self.worker_fault()
        return super().fetch(indices)

    def worker_fault(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WorkerRaises(WorkerKilled):
    def worker_fault(self) -> None:
        raise ValueError("picture 17 is truncated")


class Wrong(Tiny):
    def fault(self) -> float:
        raise KeyError("nobody's fault")


class Stops(Tiny):
    def fault(self) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0


class Waits(Tiny):
    def fault(self) -> float:
        print("waiting", flush=True)
        time.sleep(600)
        return 1.0


def main() -> int:
    """Run it."""
    training.build_task = globals()[sys.argv[1]]
    return fit.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
