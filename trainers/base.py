"""The task every method trains: a frozen backbone, the part that learns, and nothing of the first in what is kept."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from data.stepped import StepOrder, derive_seed, step_generator, stepped_loader
from trainers.config import RecipeBase


class NonFiniteLoss(RuntimeError):  # noqa: N818  (the name says what happened)
    """Training met a loss or a weight that is not a finite number."""


class FrozenBackboneTask(LightningModule):
    """A frozen backbone plus the one part that learns.  A method adds `training_step` and `train_dataloader`.

    The backbone is never in train mode, never in a checkpoint, never in the optimizer.  What learns is held in float32
    whatever the backbone's dtype.  Before batch `n` the random generators are seeded from (seed, n, rank): together
    with a loader from `stepped_loader` every update is a function of the step, and resuming is exact.

    Under ZeRO-3 a parameter is whole only inside the forward of the module that owns it: a method reads learned
    parameters there, or inside `consolidated()` from `exported`.

    Attributes:
        backbone: frozen, eval mode.  learned: trained.
        exported: what is exported and sampled with: the average when there is one.
        identity: fingerprint and description of the backbone as it was, for who exports.
        unit, units_per_sample: what throughput is counted in; a language model's task says "tokens" and its length.
    """

    identity: tuple[str, dict[str, Any]]
    unit = "images"
    units_per_sample = 1
    # Checkpoints hold the learned part only; on_load_checkpoint is strict about that part.
    strict_loading = False

    def __init__(
        self, backbone: nn.Module, learned: nn.Module, recipe: RecipeBase, copied: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            learned: must not contain the backbone; it is copied when an average is kept.
            copied: child of `learned` -> where in the backbone its initial values come from, for the table.
        """
        super().__init__()
        frozen = {id(parameter) for parameter in backbone.parameters()}
        if shared := [name for name, parameter in learned.named_parameters() if id(parameter) in frozen]:
            raise ValueError(f"learned holds the backbone's own parameter as {shared[0]}: give it a copy")
        self.recipe, self.copied = recipe, dict(copied or {})
        self.backbone = backbone.requires_grad_(False)
        self.learned = learned.float().requires_grad_(True)
        # In a list, since no strategy may take it for a part of the model: it is neither trained nor sharded nor sent.
        self._average = [copy.deepcopy(self.learned).requires_grad_(False)] if recipe.trainer.ema else []
        self._whole: nn.Module | None = None
        self.order: StepOrder | None = None
        self.batch_number, self.steps_done = -1, 0
        self._resumed_at = (0, 0)  # batch number, samples that were drawn before it
        self._notes: dict[str, tuple[Tensor, int]] = {}
        self._unchecked: tuple[str, Tensor, torch.cuda.Event] | None = None
        self.register_state_dict_post_hook(_keep_the_learned_part)  # type: ignore[no-untyped-call]
        self.note_shapes()
        self.train()

    def note_shapes(self) -> None:
        """Remembers what a checkpoint must hold; again where a method adds to what learns."""
        self._shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}

    @property
    def averaged(self) -> nn.Module | None:
        """Running average of `learned`, whole on every rank, or None."""
        return self._average[0] if self._average else None

    @property
    def exported(self) -> nn.Module:
        """What is exported and sampled with; under ZeRO whole inside `consolidated()` only."""
        if self.averaged is not None:
            return self.averaged
        return self.learned if self._whole is None else self._whole

    @contextmanager
    def consolidated(self) -> Iterator[None]:
        """Inside, `exported` has whole tensors on every rank, whatever the strategy; all ranks must enter."""
        gather = getattr(self._trainer.strategy, "whole_learned", None) if self._trainer is not None else None
        if self._whole is not None or self.averaged is not None or gather is None:
            yield
            return
        self._whole = gather()
        try:
            yield
        finally:
            self._whole = None

    @property
    def backbone_is_whole(self) -> bool:
        """Whether this rank alone can run the backbone."""
        return self._trainer is None or not getattr(self.trainer.strategy, "shards_backbone", False)

    @property
    def acts_together(self) -> bool:
        """Whether sampling needs all ranks: to run the backbone, or to gather what learns."""
        return not self.backbone_is_whole or hasattr(self.trainer.strategy, "whole_learned")

    # What a method supplies.

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; a group may set its own `lr` or `weight_decay`.  Default: all that learns, as one."""
        return [{"params": list(self.learned.parameters())}]

    # Whether an update may use a part of what learns only, which DDP then has to look for.
    may_leave_unused = False
    # Whether the backbone is only run by calling it; else only its units are sharded, and the rest is whole everywhere.
    runs_whole_backbone = True

    def sharded_units(self) -> Sequence[nn.Module]:
        """Parts of the backbone that strategy `fsdp` makes whole one at a time; default: the longest list of blocks."""
        lists = [part for part in self.backbone.modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=len, default=()))

    def runs_past_hooks(self) -> Sequence[nn.Module]:
        """Units that are not entered by calling them; `fsdp` keeps them whole while the backbone runs."""
        return ()

    def export_adapter(self, folder: Path) -> None:
        """Write the adapter of `exported` into `folder`; called on rank 0, inside `consolidated()`."""
        raise NotImplementedError(f"{type(self).__name__} does not export an adapter")

    @property
    def export_formats(self) -> dict[str, Callable[[Path], None]]:
        """What `trainers.export format=...` can write besides the adapter, by name."""
        return {}

    def sample_images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """(teacher's, student's) images [count, C, H, W] in -1..1 from the same noise, for the grid, or None."""
        return None

    def adapter_target(self) -> Any:
        """What the exported adapter is loaded into to try it: a pipeline, or the backbone."""
        return self.backbone

    # What a method calls.

    def stepped_loader(self, fetch: Callable[[Tensor], Any], length: int, batch_size: int) -> DataLoader[Any]:
        """The loader of `train_dataloader`: endless, beginning at the batch of the current step.

        Args:
            fetch: sample numbers [batch_size] -> batch, without drawing from the global random generators.
            length: how many samples there are.
            batch_size: per rank.
        """
        attached = self._trainer is not None
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if attached else (0, 1)
        first, before = self._resumed_at
        self.order = StepOrder(
            length=length,
            batch_size=batch_size,
            seed=self.recipe.seed,
            rank=rank,
            world_size=world_size,
            first=first,
            before=before,
        )
        start = self.global_step * self.recipe.trainer.accumulate_grad_batches if attached else 0
        return stepped_loader(fetch, self.order, start, self.recipe.trainer.num_workers)

    def draw_together(self, count: int, what: str) -> int:
        """A number in 0..count-1 for this batch, the same on every rank; `what` tells draws of one batch apart.

        For what decides how often the backbone runs: ranks that hold parts of it must run it equally often.
        """
        generator = step_generator(self.recipe.seed, what, self.batch_number)
        return int(torch.randint(count, (), generator=generator))

    def note(self, **values: Tensor) -> None:
        """Remember scalars for the metrics; the mean since the last line is written.  Costs one addition, no sync."""
        for name, value in values.items():
            total, count = self._notes.get(name, (0.0, 0))
            self._notes[name] = (total + value.detach(), count + 1)

    def take_notes(self) -> dict[str, float]:
        """Means of what was noted since the last call."""
        notes, self._notes = self._notes, {}
        return {name: float(total) / count for name, (total, count) in notes.items()}

    def parameter_table(self) -> list[dict[str, Any]]:
        """What is trained, what of it was copied from the backbone, what is frozen: the adapter's `trained` entry."""
        parts = dict(self.learned.named_children())
        direct = dict(self.learned.named_parameters(recurse=False))
        rows = [_row(f"learned.{name}", list(part.parameters()), self._origin(name)) for name, part in parts.items()]
        rows += [_row(f"learned.{name}", [value], self._origin(name)) for name, value in direct.items()]
        frozen = _row(
            f"backbone ({type(self.backbone).__name__})", list(self.backbone.parameters()), {"state": "frozen"}
        )
        return [row for row in rows if row["parameters"]] + [frozen]

    def _origin(self, name: str) -> dict[str, str]:
        source = self.copied.get(name)
        return {"state": "trained"} if source is None else {"state": "trained", "copied_from": source}

    # Lightning's hooks.

    def train(self, mode: bool = True) -> FrozenBackboneTask:
        """Only what learns follows the mode: frozen means dropout and running statistics too."""
        super().train(False)
        self.learned.train(mode)
        self.training = mode
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the method's groups; linear warm-up, then a cosine or a line to zero, or a constant."""
        settings, budget = self.recipe.optimizer, self.recipe.trainer
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            # The fused form unscales gradients by itself, which does not go with clipping under mixed precision.
            fused=budget.precision == "32-true",
        )
        ours = {id(parameter) for parameter in self.learned.parameters()}
        if any(id(parameter) not in ours for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("parameter_groups() names a parameter that is not in `learned`; only that part is trained")

        def factor(step: int) -> float:
            if step < settings.warmup_steps:
                return (step + 1) / settings.warmup_steps
            if settings.schedule == "constant":
                return 1.0
            done = (step - settings.warmup_steps) / max(1, budget.max_steps - settings.warmup_steps)
            if settings.schedule == "linear":
                return 1 - min(1.0, done)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """The average is no child of this module, so nothing else moves it to the device."""
        if self.averaged is not None:
            self.averaged.to(self.device)

    def on_train_start(self) -> None:
        """Batches are counted from the step that the run begins or resumes at."""
        self.batch_number = self.global_step * self.recipe.trainer.accumulate_grad_batches - 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The random numbers of a batch depend on its number and nothing that came before."""
        self.batch_number += 1
        # torch.manual_seed would also queue a call with a stack trace for every backend that is not in use.
        seed = derive_seed(self.recipe.seed, "batch", self.batch_number, self.global_rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop before a loss that is not finite reaches a weight.

        On a GPU the answer is fetched without waiting for the device and read at the next step, one update later.
        """
        where = self._where()
        # 0, or one more than the highest rank whose loss is broken: all ranks stop at the same step, none waits for one
        # that has gone.
        broken = torch.where(torch.isfinite(loss.detach()).all(), 0, self.global_rank + 1)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        if not loss.is_cuda:
            self._stop_if(broken, where)
            return
        self.check_pending()
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        answer = broken.to("cpu", non_blocking=True)
        arrived.record()
        self._unchecked = (where, answer, arrived)

    def check_pending(self) -> None:
        """Read the answer of the step before, if it is still under way."""
        if self._unchecked is not None:
            (where, answer, arrived), self._unchecked = self._unchecked, None
            arrived.synchronize()
            self._stop_if(answer, where)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One update, and the running average's."""
        super().optimizer_step(*args, **kwargs)
        # DeepSpeed counts the batches of an update itself and wants to be asked after each of them.
        if (self.batch_number + 1) % self.recipe.trainer.accumulate_grad_batches:
            return
        self.steps_done = self.global_step + 1
        if self.averaged is not None:
            # A young average forgets faster, else the initial weights would stay in it for thousands of updates.
            decay = min(self.recipe.trainer.ema, (1 + self.steps_done) / (10 + self.steps_done))
            masters = getattr(self.trainer.strategy, "full_learned", lambda: dict(self.learned.named_parameters()))()
            ours = list(self.averaged.parameters())
            theirs = [masters[name] for name, _ in self.averaged.named_parameters()]
            update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            update([p.data for p in ours], [p.data for p in theirs], 0)
            for mine, buffer in zip(self.averaged.buffers(), self.learned.buffers(), strict=True):
                mine.copy_(buffer)

    def on_train_end(self) -> None:
        """The last step's loss is checked too, and what ZeRO shards is gathered while its engine is there."""
        self.check_pending()
        if self.averaged is None and (gather := getattr(self.trainer.strategy, "whole_learned", None)) is not None:
            self._whole = gather()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never replace a good checkpoint by one whose weights are broken.  Adds the position in the data."""
        self.check_pending()
        number = self.batch_number + 1
        checkpoint["data_position"] = [number, self.order.position(number) if self.order else 0]
        learned = [value for name, value in checkpoint["state_dict"].items() if name.startswith("learned.")]
        sums = torch.stack([value.detach().float().sum() for value in learned])
        if not bool(torch.isfinite(sums).all()):
            place = self._described(self._where(), self.global_rank)
            raise NonFiniteLoss(f"the learned weights are not finite after {place}: lower optimizer.lr")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Every learned name with its shape must be there, and nothing else."""
        want = self._shapes
        got = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if missing := sorted(want.keys() - got.keys()):
            raise ValueError(f"the checkpoint lacks {missing[0]} ({len(missing)} missing): it is of another module")
        if unknown := sorted(got.keys() - want.keys()):
            raise ValueError(f"the checkpoint has {unknown[0]}, which this module lacks ({len(unknown)} such)")
        if wrong := [name for name in want if want[name] != got[name]]:
            raise ValueError(f"{wrong[0]} is {got[wrong[0]]} in the checkpoint but {want[wrong[0]]} in this module")
        if self.averaged is not None:
            state = checkpoint["state_dict"]
            self.averaged.load_state_dict({name: state[f"averaged.{name}"] for name in self.averaged.state_dict()})
        self.steps_done = int(checkpoint["global_step"])
        number, samples = checkpoint.get("data_position", (0, 0))
        self._resumed_at = (int(number), int(samples))

    def _where(self) -> tuple[int, int]:
        return self.global_step, self.batch_number

    def _described(self, where: tuple[int, int], rank: int) -> str:
        step, number = where
        text = f"step {step}, batch {number}" + (f" of rank {rank}" if self.trainer.world_size > 1 else "")
        if self.order is None or number < 0:
            return text
        samples = dataclasses.replace(self.order, rank=rank).indices(number).tolist()
        more = ", ..." if len(samples) > 8 else ""
        return f"{text} (samples {', '.join(map(str, samples[:8]))}{more})"

    def _stop_if(self, broken: Tensor, where: tuple[int, int]) -> None:
        if rank := int(broken):
            place = self._described(where, rank - 1)
            raise NonFiniteLoss(f"the loss is not finite at {place}: lower optimizer.lr, or look at those samples")


def _keep_the_learned_part(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    # The versions of modules that torch notes beside the tensors name every part of the backbone.
    for names in (state, getattr(state, "_metadata", {})):
        for name in [name for name in names if not name.startswith(f"{prefix}learned")]:
            del names[name]
    if (averaged := cast(FrozenBackboneTask, module).averaged) is not None:
        state |= {f"{prefix}averaged.{name}": value for name, value in averaged.state_dict().items()}


def _row(name: str, parameters: list[nn.Parameter], origin: Mapping[str, str]) -> dict[str, Any]:
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    return {"part": name, **origin, "tensors": len(parameters), "parameters": count, "dtype": "+".join(dtypes)}


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and all bits of a module's state: equal before and after means frozen."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
