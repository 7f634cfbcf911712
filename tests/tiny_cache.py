"""What the contract cases of learned caches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from data.stepped import derive_seed
from modules.diffusion_host import WorkCounter
from modules.pipelines import driver, load_pipeline
from tests.contract_cases.interface import ContractCase
from tests.tiny import tiny_transformer
from tests.tiny_ilf import GUIDANCE, latents_of_call


def cache_case(
    recipe: Any, name: str, graph_outputs: Callable[[Any], Tensor], labels: list[int], **more: Any
) -> ContractCase:
    """A learned cache on the saved tiny DiT `name`, its runs being those of `labels` from the recipe's own noise."""
    seeds = [derive_seed(recipe.seed, "trajectory", i) for i in range(len(labels))]
    steps = recipe.module.steps

    def outputs(pipe: Any, handle: Any) -> Tensor:
        call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE} if handle is None else handle.call_kwargs
        return latents_of_call(driver(pipe, name), labels, seeds, **call)

    def work(pipe: Any, handle: Any) -> float:
        with WorkCounter(pipe) as counter:
            outputs(pipe, handle)
        return counter.submodules

    def other(**changes: Any) -> Any:
        """Attaching to a pipeline that differs."""

        def attach(load: Any) -> None:
            pipe = load_pipeline(name)
            if "transformer" in changes:
                pipe.register_modules(transformer=changes["transformer"])
            else:
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
        make_neutral=lambda handle: handle.use(1.0),
        work=work,
        misfits={
            "num_layers 4 (here 5)": other(transformer=tiny_transformer("dit", 5)),
            "fingerprint": other(transformer=tiny_transformer("dit", seed=1)),
            "dtype 'float32' but dtype is 'bfloat16'": other(transformer=tiny_transformer("dit").bfloat16()),
            "beta_end 0.02": other(beta_end=0.01),
            f"{steps} steps": call(num_inference_steps=steps + 1),
            "guidance_scale 3": call(guidance_scale=4.0),
        },
        **more,
    )
