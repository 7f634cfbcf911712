"""The decode-loop host: drafters guess, the backbone verifies a tree of guesses per call, transformers generates."""

from modules.decode_host.attach import DecodeHandle, attach_drafter
from modules.decode_host.counts import Counts
from modules.decode_host.draft import Draft, DraftState
from modules.decode_host.generate import DraftedDecoding
from modules.decode_host.rules import Exact, Rule, Sampled, Typical
from modules.decode_host.tree import Tree, TreeTables, order_choices

__all__ = [
    "Counts",
    "DecodeHandle",
    "Draft",
    "DraftState",
    "DraftedDecoding",
    "Exact",
    "Rule",
    "Sampled",
    "Tree",
    "TreeTables",
    "Typical",
    "attach_drafter",
    "order_choices",
]
