"""Medusa: heads that guess the tokens after the next one (docs/methods/medusa.md).  Start reading at heads.py."""

from modules.medusa.attach import MedusaHandle, attach, attach_heads, heads_of, module_entry
from modules.medusa.config import MedusaConfig
from modules.medusa.drafter import MedusaDrafter, StackedHeads
from modules.medusa.heads import MedusaHeads
from modules.medusa.output_layer import OutputLayer

__all__ = [
    "MedusaConfig",
    "MedusaDrafter",
    "MedusaHandle",
    "MedusaHeads",
    "OutputLayer",
    "StackedHeads",
    "attach",
    "attach_heads",
    "heads_of",
    "module_entry",
]
