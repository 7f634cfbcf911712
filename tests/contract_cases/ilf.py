"""ILF on the tiny DiT pipeline, with a learned solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.stepped import derive_seed
from modules.diffusion_host import WorkCounter
from modules.pipelines import driver, load_pipeline
from modules.solvers import LearnedMultistepScheduler
from tests.contract_cases.interface import ContractCase
from tests.tiny import tiny_transformer
from tests.tiny_ilf import GUIDANCE, LEARNED_SOLVER, latents_of_call, save_tiny, tiny_recipe
from trainers.ilf.task import ILFTask


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny("dit", folder)
    recipe = tiny_recipe(name, **LEARNED_SOLVER)
    seeds = [derive_seed(recipe.seed, "trajectory", i) for i in range(recipe.data.trajectories)]

    def outputs(pipe: Any, handle: Any) -> Tensor:
        call = {"num_inference_steps": 3, "guidance_scale": GUIDANCE} if handle is None else handle.call_kwargs
        return latents_of_call(driver(pipe, name), [3, 1, 4, 1, 5, 9], seeds, **call)

    def graph_outputs(task: ILFTask) -> Tensor:
        runs = task.runs.select(torch.arange(len(seeds)))
        runs.conditions.asked["labels"].copy_(torch.tensor([3, 1, 4, 1, 5, 9]))
        return task.rollout.final(task.learned, task.loop, runs)

    def baseline(pipe: Any, handle: Any) -> Tensor:
        """The plain backbone under the adapter's sampler, which is no neutral part of it."""
        pipe.scheduler = LearnedMultistepScheduler(**handle.config.solver)
        return outputs(pipe, None)

    def work(pipe: Any, handle: Any) -> float:
        with WorkCounter(pipe) as counter:
            if handle is None:
                driver(pipe, name).generate([3], [1], num_inference_steps=20, guidance_scale=GUIDANCE)
            else:
                counter.also(handle.module.feedback)
                driver(pipe, name).generate([3], [1], **handle.call_kwargs)
        return counter.blocks

    def other(**changes: Any) -> Any:
        """Attaching to a pipeline that differs."""

        def attach(load: Any) -> None:
            pipe = load_pipeline(name)
            if "transformer" in changes:
                pipe.register_modules(transformer=changes["transformer"])
            if "beta_end" in changes:
                pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
            load(pipe)

        return attach

    def call(**changes: Any) -> Any:
        """Attaching to the right pipeline and calling it in another way."""

        def run(load: Any) -> None:
            pipe = load_pipeline(name)
            with load(pipe) as handle:
                driver(pipe, name).generate([3], [1], **{**handle.call_kwargs, **changes})

        return run

    return ContractCase(
        recipe=recipe,
        target=lambda: load_pipeline(name),
        outputs=outputs,
        graph_outputs=graph_outputs,
        make_neutral=lambda handle: handle.module.scale.zero_(),
        baseline=baseline,
        work=work,
        misfits={
            "num_layers 4 (here 5)": other(transformer=tiny_transformer("dit", 5)),
            "fingerprint": other(transformer=tiny_transformer("dit", seed=1)),
            "dtype 'float32' but dtype is 'bfloat16'": other(transformer=tiny_transformer("dit").bfloat16()),
            "beta_end 0.02": other(beta_end=0.01),
            "3 steps": call(num_inference_steps=4),
            "guidance_scale 3": call(guidance_scale=4.0),
        },
    )
