"""Locret on the tiny Llama: what is compared are the logits behind a context that was cut down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from modules.kv_host import attach_cache
from modules.language_models import load_model
from modules.locret import LocretSelector
from tests.contract_cases.interface import ContractCase
from tests.tiny_kv import save_tiny, tiny_recipe
from tests.tiny_language import VOCABULARY, tiny_llama
from trainers.kv_cases import cache_bytes
from trainers.locret.task import LocretTask

CONTEXT, BUDGET = 40, 6


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny(folder)
    ids = torch.randint(2, VOCABULARY, (2, CONTEXT + 8), generator=torch.Generator().manual_seed(3))

    def read(model: Any, handle: Any) -> Any:
        if handle is not None:
            return handle.prefill(ids[:, :CONTEXT])
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :CONTEXT], past_key_values=cache)
        return cache

    @torch.no_grad()
    def outputs(model: Any, handle: Any) -> Tensor:
        return model(ids[:, CONTEXT:], past_key_values=read(model, handle)).logits

    def graph_outputs(task: LocretTask) -> Tensor:
        """By the heads that were trained, without the way through the adapter's files."""
        config = task.learned.config
        with attach_cache(task.backbone, selector=LocretSelector(task.learned), policy=config.cache_policy()) as handle:
            return outputs(task.backbone, handle)

    def other(**settings: Any) -> Any:
        return lambda load: load(tiny_llama(**settings))

    def twice(load: Any) -> None:
        model, _ = load_model(name)
        load(model)
        load(model)

    return ContractCase(
        recipe=tiny_recipe("locret", name),
        target=lambda: load_model(name)[0],
        outputs=outputs,
        graph_outputs=graph_outputs,
        make_neutral=lambda handle: handle.use(budget=None),
        work=lambda model, handle: float(cache_bytes(read(model, handle))),
        misfits={
            "num_hidden_layers 2 (here 3)": other(layers=3),
            "hidden_size 32 (here 64)": other(hidden=64),
            "fingerprint": other(seed=1),
            "has a selector already": twice,
        },
        neutral_bound=2e-5,
    )
