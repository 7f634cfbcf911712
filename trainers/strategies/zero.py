"""DeepSpeed ZeRO on CUDA and on CPU, with one plain checkpoint file that every other strategy reads too.

Lightning's own strategy refuses a CPU, writes a folder of shards that only the same number of processes can read, and
casts what learns to the precision's dtype.  Here the learned part stays float32 as under every other strategy (autocast
does the rest), and checkpoints hold whole tensors.  Private names are used, so the packages' versions are bounded in
pyproject.toml and tests/test_strategies.py fails where one of them has moved.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from trainers.base import FrozenBackboneTask

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported
import deepspeed

_MOMENTS = ("exp_avg", "exp_avg_sq")


class KeepsDtypes(DeepSpeedPrecision):
    """Lightning's `32-true` casts the whole model, and would double a bfloat16 backbone."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module as it is."""
        return module

    def convert_input(self, data: Any) -> Any:
        """The batch as it is."""
        return data


class ZeRO(DeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3, with or without offloading to the host's memory.

    Stages 1 and 2 shard the optimizer's state (and gradients) of what learns; stage 3 also the backbone, which is what
    makes room for one that a single device cannot hold.
    """

    def __init__(self, stage: int, offload: bool, *, precision: str, timeout: timedelta) -> None:
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            timeout=timeout,
            precision_plugin=KeepsDtypes("32-true"),
            # Overlapping needs a second stream, which a CPU has not.
            overlap_comm=torch.cuda.is_available(),
        )
        assert isinstance(self.config, dict)
        # The host's Adam is compiled for minutes when first used; what learns is small, and torch's runs as it is.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["train_micro_batch_size_per_gpu"] = 1  # only for DeepSpeed's own throughput log
        self.autocast = torch.bfloat16 if precision == "bf16-mixed" else None
        self._skeleton: nn.Module | None = None

    @property
    def shards_backbone(self) -> bool:
        """Whether a rank alone cannot run the backbone."""
        return bool(self.zero_stage_3)

    @property
    def task(self) -> FrozenBackboneTask:
        """What is trained."""
        return cast("FrozenBackboneTask", self.lightning_module)

    # What a CPU needs.

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed compares the index of the device with a number, and a plain CPU device has none."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Lightning checks here that the device is a GPU."""
        if super().root_device.type != "cpu":
            super().setup_environment()
            return
        if deepspeed.get_accelerator().device_name() != "cpu":
            raise ValueError(
                "DeepSpeed has chosen a GPU but trainer.accelerator is cpu: set DS_ACCELERATOR=cpu in the environment"
            )
        # Its communication through shared memory is for inference, and would be compiled at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """As Lightning's, which also wants a device index on a CPU."""
        if super().root_device.type != "cpu":
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    # What learns.

    def setup(self, trainer: Any) -> None:
        """Keeps what a plain copy of the learned part is made from."""
        self._skeleton = copy.deepcopy(self.task.learned).cpu()
        super().setup(trainer)
        self._keep_whole()

    def _keep_whole(self) -> None:
        """Under stage 3 the weights that learn are gathered once per update, as DeepSpeed does with small ones.

        A method may then use them outside the forward of the module that owns them, as losses in chunks do; gradients,
        masters and moments stay sharded.  The same goes for what a backbone has outside its blocks, where a method
        enters it elsewhere than by calling it.
        """
        if not self.zero_stage_3:
            return
        held = cast(Any, self.optimizers[0]).persistent_parameters
        wanted: list[Any] = list(self.task.learned.parameters())
        if not self.task.runs_whole_backbone:
            sharded = {id(p) for unit in self.task.sharded_units() for p in unit.parameters()}
            wanted += [p for p in self.task.backbone.parameters() if id(p) not in sharded]
        for parameter in wanted:
            # Off its recorded order of modules, as in generation, DeepSpeed lets go of all but external parameters.
            parameter.is_external_param = True
            if not parameter.ds_persist:
                parameter.ds_persist = True
                held.append(parameter)
        wanted[0].all_gather(wanted)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Autocast around the step, as `bf16-mixed` is elsewhere."""
        device = super().root_device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            return super().training_step(*args, **kwargs)

    def full_learned(self) -> dict[str, Tensor]:
        """The learned part's whole float32 tensors by name; every rank must ask."""
        learned = self.task.learned
        found = {name: self._gather(value) for name, value in learned.named_parameters()}
        return {**found, **self._buffers()}

    def _buffers(self) -> dict[str, Tensor]:
        """The learned part's buffers that belong into a checkpoint, whole on every rank."""
        stored = self.task.learned.state_dict().keys()
        return {name: buffer for name, buffer in self.task.learned.named_buffers() if name in stored}

    def whole_learned(self) -> nn.Module:
        """A plain copy of the learned part with its whole tensors; every rank must ask."""
        assert self._skeleton is not None  # made in setup
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(self.full_learned(), strict=False)
        return whole.to(super().root_device)

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors under the names that every strategy uses."""
        averaged = {name: value for name, value in self.task.state_dict().items() if name.startswith("averaged.")}
        return {f"learned.{name}": value for name, value in self.full_learned().items()} | averaged

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of a plain AdamW over the same parameters, whole."""
        groups, state, number = [], {}, 0
        for own, group in zip(self.task.parameter_groups(), self._inner(optimizer).param_groups, strict=True):
            numbers = []
            for parameter in own["params"]:
                moments = {key: self._gather(parameter, key).cpu() for key in _MOMENTS}
                state[number] = {"step": torch.tensor(float(self.task.steps_done)), **moments}
                numbers.append(number)
                number += 1
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
        return {"state": state, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, from rank 0; the tensors were gathered by all."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file, read by every rank."""
        return cast(dict[str, Any], self.checkpoint_io.load_checkpoint(Path(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Masters, and the tensors that compute; the task has read its average itself."""
        state = checkpoint["state_dict"]
        for name, parameter in self.task.learned.named_parameters():
            value = state[f"learned.{name}"].to(super().root_device)
            with torch.no_grad(), self._gathered([parameter]):
                if not self.zero_stage_3 or self.is_global_zero:
                    parameter.copy_(value)
            flat, here, there = self._share(parameter)
            flat.data[here].copy_(value.flatten()[there])
        for name, buffer in self._buffers().items():
            buffer.copy_(state[f"learned.{name}"])
        self._keep_whole()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning's strategy leaves it to DeepSpeed's own files."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its share of a plain AdamW's state."""
        saved = checkpoint["optimizer_states"][0]
        inner = self._inner(self.optimizers[0])
        for own, group, kept in zip(
            self.task.parameter_groups(), inner.param_groups, saved["param_groups"], strict=True
        ):
            group.update({key: value for key, value in kept.items() if key != "params"})
            for parameter, number in zip(own["params"], kept["params"], strict=True):
                flat, here, there = self._share(parameter)
                state = inner.state[flat]
                for key in _MOMENTS:
                    moment = state.setdefault(key, torch.zeros_like(flat))
                    value = saved["state"][number][key].to(moment.device).flatten()
                    moment[here].copy_(value[there])
                state["step"] = saved["state"][number]["step"].to(flat.device, copy=True)

    def _inner(self, optimizer: Any) -> Optimizer:
        return cast(Optimizer, getattr(optimizer, "optimizer", optimizer))

    def _gather(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """The whole master of a parameter, or the whole of one of its moments."""
        flat, here, there = self._share(parameter)
        whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=super().root_device)
        if here.stop > here.start:
            part = flat if moment is None else self._inner(self.optimizers[0]).state[flat][moment]
            whole[there] = part.detach()[here].to(whole.device)
        torch.distributed.all_reduce(whole)
        return whole.reshape(getattr(parameter, "ds_shape", parameter.shape))

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0) if self.zero_stage_3 else nullcontext()

    def _share(self, parameter: Any) -> tuple[Tensor, slice, slice]:
        """(flat master that this rank holds, where in it the parameter's share lies, which part of it that is)."""
        engine: Any = self.optimizers[0]
        if self.zero_stage_3:
            group, start, length = engine.grad_position[engine.get_param_id(parameter)]
            flat, first = engine.fp32_partitioned_groups_flat[group], self.global_rank * length
            length = max(0, min(length, parameter.ds_numel - first))
            return flat, slice(start, start + length), slice(first, first + length)
        mapping = parameter._hp_mapping
        if mapping is None:  # the whole parameter is another rank's
            group = next(i for i, held in enumerate(engine.bit16_groups) if any(p is parameter for p in held))
            return engine.single_partition_of_fp32_groups[group], slice(0, 0), slice(0, 0)
        flat = engine.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return (
            flat,
            slice(here.start, here.start + here.numel),
            slice(there.start, there.start + there.numel),
        )
