"""Medusa: heads that guess the tokens after the next one (docs/methods/medusa.md).  Start reading at heads.py."""

from modules.medusa.attach import MedusaHandle, attach, attach_heads, heads_of, module_entry
from modules.medusa.config import MedusaConfig
from modules.medusa.drafter import MedusaDrafter
from modules.medusa.heads import MedusaHeads
from modules.medusa.output_layer import OutputLayer
from modules.medusa.stacked import StackedHeads

CARD_NOTES = (
    "`model.generate` drafts by itself once the adapter is loaded: greedy text is the model's own token for token, "
    "sampled text has the same law.\n\n"
    "This folder is for `load_adapter`; no serving engine reads it. Of heads that read the hidden state alone "
    "(`reads` is `state`) `python -m trainers.export run=<run> format=tgi` writes the folder that "
    "Text Generation Inference reads, `format=vllm` the one of vLLM 0.25 and 0.26. Both draft "
    "the top-1 chain only. Later versions of vLLM have no Medusa any more, and SGLang never had it."
)
"""What an adapter's card says beyond what holds for every method."""

__all__ = [
    "CARD_NOTES",
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
