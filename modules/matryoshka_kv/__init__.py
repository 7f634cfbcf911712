"""MatryoshkaKV: trained orthogonal projections of keys and values (docs/methods/matryoshka_kv.md).

Start reading at projections.py.
"""

from modules.matryoshka_kv.attach import MatryoshkaHandle, attach, codec_of
from modules.matryoshka_kv.config import MatryoshkaConfig
from modules.matryoshka_kv.projections import MatryoshkaProjections, draw_masks, projecting_probe, rank_masks
from modules.matryoshka_kv.ranks import search_ranks

CARD_NOTES = (
    "The model's cache stores the first coordinates of keys and values in trained bases once the adapter is loaded, as "
    "many as its table of ranks says: nothing is masked, nothing padded. `handle.use_budget(0.375)` takes another of "
    "its tables, `handle.use_budget('full')` gives the model's own text, or that of the model with LoRA where the "
    "adapter brings it."
)
"""What an adapter's card says beyond what holds for every method."""

__all__ = [
    "CARD_NOTES",
    "MatryoshkaConfig",
    "MatryoshkaHandle",
    "MatryoshkaProjections",
    "attach",
    "codec_of",
    "draw_masks",
    "projecting_probe",
    "rank_masks",
    "search_ranks",
]
