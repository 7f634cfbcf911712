"""Whether a recipe's loggers can work, found out before torch is imported or a folder is made."""

from __future__ import annotations

from importlib.util import find_spec

from trainers.config import RecipeBase
from trainers.settings import ConfigError


def check_loggers(recipe: RecipeBase) -> None:
    """Refuse a run whose logger cannot work.

    Raises:
        ConfigError: W&B is not installed, or must be online and cannot be.
    """
    if not recipe.logs_to("wandb"):
        return
    if find_spec("wandb") is None:
        raise ConfigError(
            ["logger wandb needs W&B, which is not installed: pip install afterburner[train], or set logger=csv"]
        )
    if recipe.wandb.mode == "online" and (reason := sign_in()):
        raise ConfigError([f"wandb.mode is online but {reason}: mend that, or set wandb.mode=auto or offline"])


def sign_in() -> str | None:
    """Sign in to W&B with the key that is configured: None, or why not.  Never prompts; gives up after ten seconds."""
    import wandb

    wandb.setup(wandb.Settings(mode="online", silent=True))
    try:
        if wandb.login(prompt=False, verify=True):
            return None
    except (wandb.Error, ValueError) as error:
        return f"signing in failed ({' '.join(str(error).split()).rstrip('.')})"
    return "no key is configured (`wandb login`, or WANDB_API_KEY)"
