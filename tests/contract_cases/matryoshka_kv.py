"""MatryoshkaKV on the tiny Llama: the truncated cache against the training graph's zeroed coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from modules.language_models import load_model
from modules.matryoshka_kv import rank_masks
from tests.contract_cases.interface import ContractCase
from tests.tiny_kv import save_tiny, tiny_recipe
from tests.tiny_language import VOCABULARY, tiny_llama
from trainers.kv_cases import cache_bytes
from trainers.matryoshka_kv.task import MatryoshkaTask


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny(folder)
    ids = torch.randint(2, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def outputs(model: Any, handle: Any) -> Tensor:
        cache = DynamicCache(config=model.config) if handle is None else handle.cache()
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(20, dim=1)], dim=1)

    @torch.no_grad()
    def graph_outputs(task: MatryoshkaTask) -> Tensor:
        ranks = torch.tensor(task.config().table(task.config().budget))
        with task.projected(task.learned, rank_masks(ranks, task.learned.head_dim)):
            return task.backbone(ids).logits

    def work(model: Any, handle: Any) -> float:
        cache = DynamicCache(config=model.config) if handle is None else handle.cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        return float(cache_bytes(cache))

    def other(**settings: Any) -> Any:
        return lambda load: load(tiny_llama(**settings))

    def twice(load: Any) -> None:
        model, _ = load_model(name)
        load(model)
        load(model)

    return ContractCase(
        recipe=tiny_recipe("matryoshka_kv", name),
        target=lambda: load_model(name)[0],
        outputs=outputs,
        graph_outputs=graph_outputs,
        make_neutral=lambda handle: handle.use_budget("full"),
        work=work,
        misfits={
            "num_hidden_layers 2 (here 3)": other(layers=3),
            "hidden_size 32 (here 64)": other(hidden=64),
            "fingerprint": other(seed=1),
            "has a codec already": twice,
        },
        bound=5e-5,
        neutral_bound=2e-5,
        still={
            "start": "PCA, which is a fixed frame",
            "start_means": "PCA's means, which are compared with",
            "spectra": "the variances along PCA's columns, which are kept for users",
        },
    )
