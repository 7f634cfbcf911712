"""Locret: heads that say which cached tokens will be looked at (docs/methods/locret.md).  Start reading at heads.py."""

from modules.locret.attach import LocretHandle, attach, heads_of
from modules.locret.config import LocretConfig
from modules.locret.heads import LocretSelector, RetainingHead, RetainingHeads
from modules.locret.labels import causal_importance, features_and_labels, features_while_evicting

CARD_NOTES = (
    "`model.generate` reads prompts in chunks once the adapter is loaded, and no layer ever holds more than "
    "`budget + chunk` units per head while it does. The text is that of the model with a smaller memory, not the "
    "model's own: `handle.use(budget=...)` sets how much is kept, `handle.use(budget=None)` keeps everything."
)
"""What an adapter's card says beyond what holds for every method."""

__all__ = [
    "CARD_NOTES",
    "LocretConfig",
    "LocretHandle",
    "LocretSelector",
    "RetainingHead",
    "RetainingHeads",
    "attach",
    "causal_importance",
    "features_and_labels",
    "features_while_evicting",
    "heads_of",
]
