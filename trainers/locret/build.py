"""From a recipe to its task: the backbone, its contexts, and untrained heads that fit it."""

from __future__ import annotations

from dataclasses import asdict

from modules.kv_host import CachePolicy, attention_sites
from modules.language_models import load_model
from modules.locret import LocretConfig, RetainingHeads
from trainers.contexts import training_source
from trainers.locret.task import LocretTask
from trainers.schemas.locret import Recipe


def build_task(recipe: Recipe) -> LocretTask:
    """Loads the backbone and makes its heads.

    Raises:
        ValueError: the recipe does not fit the backbone, or what it learns from cannot be read.
    """
    backbone, settings = recipe.backbone, recipe.module
    model, tokenizer = load_model(backbone.name, backbone.revision, backbone.dtype)
    sites = attention_sites(model)
    policy = CachePolicy(
        budget=settings.budget,
        chunk=settings.chunk,
        stabilizers=settings.stabilizers,
        local=settings.local,
        positions=settings.positions,
        decode_every=settings.decode_every,
        query_first=settings.query_aware,
    )
    config = LocretConfig(
        num_layers=len(sites),
        query_heads=sites[0].query_heads,
        kv_heads=sites[0].kv_heads,
        head_dim=sites[0].head_dim,
        hidden_size=settings.hidden_size,
        activation=model.config.get_text_config(decoder=True).hidden_act,
        policy=asdict(policy),
    )
    return LocretTask(recipe, model, RetainingHeads(config), training_source(recipe.data, model, tokenizer))
