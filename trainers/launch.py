"""Who started this process beside others: srun, torchrun, or nobody (then Lightning starts the others itself)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from trainers.config import RecipeBase
from trainers.settings import ConfigError

PROCESS_KEYS = ("trainer.devices", "trainer.num_nodes")
Recipe = TypeVar("Recipe", bound=RecipeBase)


@dataclass(frozen=True)
class Launch:
    """One process of `nodes` x `per_node` that a launcher started."""

    launcher: str
    rank: int
    nodes: int
    per_node: int

    def agree(self, key: str, choose: Callable[[], str]) -> str:
        """What rank 0 chooses, on every rank of a torchrun."""
        from torch.distributed import TCPStore

        # The store of torchrun's own agent: it is there before a process group is.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        if self.rank == 0 and not store.check([key]):
            store.set(key, choose())
        return store.get(key).decode()


def current_launch() -> Launch | None:
    """What srun or torchrun say in the environment, or None.

    Raises:
        ConfigError: the nodes of a step have unequal numbers of tasks.
    """
    known = os.environ
    if "TORCHELASTIC_RUN_ID" in known:  # first, since a batch script may start torchrun by srun
        world, per_node = int(known["WORLD_SIZE"]), int(known["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(known["RANK"]), world // per_node, per_node)
    if "SLURM_STEP_ID" not in known or in_a_shell():
        return None
    tasks, nodes = int(known["SLURM_STEP_NUM_TASKS"]), int(known["SLURM_STEP_NUM_NODES"])
    if tasks % nodes or "," in known.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise ConfigError(
            [f"srun started {tasks} tasks unevenly on {nodes} nodes: use --ntasks-per-node, one task per device"]
        )
    return Launch("srun", int(known["SLURM_PROCID"]), nodes, tasks // nodes)


def in_a_shell() -> bool:
    """Typed in a shell that salloc or `srun --pty bash` opened: the names are those that Lightning goes by, too."""
    interactive = "SLURM_PTY_PORT" in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return interactive and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"


def fitted(recipe: Recipe, typed: Collection[str]) -> Recipe:
    """The recipe with the processes that a launcher started, where it leaves them at one.

    Args:
        typed: keys that the command line sets; they are never changed.
    Raises:
        ConfigError: the recipe asks for other numbers than there are.
    """
    launch = current_launch()
    if launch is None:
        return recipe
    given = {"devices": launch.per_node, "num_nodes": launch.nodes}
    asked = {key: getattr(recipe.trainer, key) for key in given}
    free = {key for key in given if asked[key] == "auto" or (asked[key] == 1 and f"trainer.{key}" not in typed)}
    if wrong := [f"trainer.{key}={asked[key]}" for key in given if key not in free and asked[key] != given[key]]:
        raise ConfigError(
            [
                f"{launch.launcher} started {launch.per_node} processes on each of {launch.nodes} nodes, which "
                f"{' and '.join(wrong)} does not allow: start as many as the recipe asks for, or set "
                f"trainer.devices={launch.per_node} trainer.num_nodes={launch.nodes}"
            ]
        )
    return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update=given)})


def cluster_plugins() -> list[Any]:
    """What Lightning must be told of the launch: it looks at SLURM's variables alone, and requeues in its own way."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

    launch = current_launch()
    if launch is None:
        # Inside an allocation but not under srun, Lightning would wait for tasks that nobody starts.
        return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []
    if launch.launcher != "srun":
        return []
    # srun does not pass on what only its own command line said, and Lightning insists on it.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))
    return [SLURMEnvironment(auto_requeue=False)]
